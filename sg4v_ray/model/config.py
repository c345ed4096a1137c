# SPDX-License-Identifier: Apache-2.0
"""The shape of a model: one architecture from the laptop's nano to 13B, only the numbers differ.

The architecture is `transformers.LlavaForConditionalGeneration`: a CLIP vision tower, a projector
of two linear layers and a Llama language model.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.model.geometry import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from transformers import LlavaConfig

BOS_TOKEN_ID: Final = 1
EOS_TOKEN_ID: Final = 2
"""Llama's ids, which every tokenizer of ours keeps."""


@identity_keys(
    "ModelConfig",
    name="name",
    image_size="image_size",
    patch_size="patch_size",
    vision_width="vision_width",
    vision_mlp="vision_mlp",
    vision_layers="vision_layers",
    vision_heads="vision_heads",
    text_width="text_width",
    text_mlp="text_mlp",
    text_layers="text_layers",
    text_heads="text_heads",
    text_kv_heads="text_kv_heads",
    vocab_size="vocab_size",
    max_positions="max_positions",
    image_token_id="image_token_id",  # noqa: S106
    pad_token_id="pad_token_id",  # noqa: S106
    image_mean="image_mean",
    image_std="image_std",
    init_std="init_std",
    feature_layer="feature_layer",
    vision_act="vision_act",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Every number that decides the shapes of a model."""

    name: str
    image_size: int
    """Pixels of a side of the square that the vision tower sees."""
    patch_size: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_mlp: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    vocab_size: int
    """Rows of the embedding and of the head; the tokenizer may have fewer tokens."""
    max_positions: int
    """The longest sequence, image tokens included."""
    image_token_id: int
    pad_token_id: int
    image_mean: tuple[float, ...] = CLIP_MEAN
    """Of each channel over the images that the tower was first trained on, 0 to 1."""
    image_std: tuple[float, ...] = CLIP_STD
    init_std: float = 0.02
    """Deviation of the projector's and the language model's first weights, where they are not
    pretrained. Default: Llama's."""
    feature_layer: int = -2
    """Which hidden state of the vision tower is projected: -1 is the last block's."""
    vision_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the vision tower: OpenAI's CLIP has quick_gelu, most of open_clip's gelu."""

    def __post_init__(self) -> None:
        for what, whole, part in (
            ("image_size by patch_size", self.image_size, self.patch_size),
            ("vision_width by vision_heads", self.vision_width, self.vision_heads),
            ("text_width by text_heads", self.text_width, self.text_heads),
            ("text_heads by text_kv_heads", self.text_heads, self.text_kv_heads),
        ):
            if part < 1 or whole < 1 or whole % part:
                raise ConfigError(f"{self.name}: cannot divide {what}: {whole} / {part}")
        if not -self.vision_layers <= self.feature_layer <= -1:
            raise ConfigError(
                f"{self.name}: feature_layer must be between -{self.vision_layers} and -1, "
                f"got {self.feature_layer}"
            )
        for field in ("image_token_id", "pad_token_id"):
            if not EOS_TOKEN_ID < getattr(self, field) < self.vocab_size:
                raise ConfigError(
                    f"{self.name}: {field} must be above {EOS_TOKEN_ID} and below vocab_size "
                    f"{self.vocab_size}, got {getattr(self, field)}"
                )

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes in the language model."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def used_vision_layers(self) -> int:
        """Vision blocks whose output reaches the language model; later ones are dead weight."""
        return self.vision_layers + 1 + self.feature_layer


def nano(vocab_size: int = 512) -> ModelConfig:
    """Return a model that learns easy-VQA on two CPU cores in minutes.

    Its tower is trained from nothing, so CLIP's mean and deviation mean nothing to it. CLIP's first
    layer norm keeps the direction of a patch and not its length: pale pixels must be near 0, or
    shapes are learnt late, and no two colours may lie in one direction, or they look the same.
    With one mean for all channels black and grey do: 96 of 241 were taken for each other after
    2,500 steps. So each channel has a mean of its own (2026-11).
    """
    return ModelConfig(
        name="nano",
        image_size=64,
        patch_size=8,
        vision_width=128,
        vision_mlp=512,
        vision_layers=4,
        vision_heads=4,
        text_width=128,
        text_mlp=384,
        text_layers=3,
        text_heads=4,
        text_kv_heads=4,
        vocab_size=vocab_size,
        max_positions=1024,
        image_token_id=4,
        pad_token_id=3,
        image_mean=(1.0, 0.9, 0.7),
        image_std=(0.2, 0.2, 0.2),
        # 1 / sqrt(width). At Llama's 0.02 projected images are a tenth as large, and shapes were
        # learnt three times slower (2026-11, two runs of 400 steps).
        init_std=0.08,
    )


def llava_7b() -> ModelConfig:
    """Return CLIP ViT-L/14 at 336 pixels with Vicuna-7B, as ShareGPT4V-7B and LLaVA-1.5-7B.

    Source: the published llava-hf/llava-1.5-7b-hf, whose vocabulary is padded from 32,000 (plus
    `<image>` and `<pad>`) to 32,064.
    """
    return ModelConfig(
        name="llava-7b",
        image_size=336,
        patch_size=14,
        vision_width=1024,
        vision_mlp=4096,
        vision_layers=24,
        vision_heads=16,
        text_width=4096,
        text_mlp=11008,
        text_layers=32,
        text_heads=32,
        text_kv_heads=32,
        vocab_size=32_064,
        max_positions=4096,
        image_token_id=32_000,
        pad_token_id=32_001,
    )


def llava_13b() -> ModelConfig:
    """Return the same vision tower with Vicuna-13B, as ShareGPT4V-13B and LLaVA-1.5-13B."""
    return replace(
        llava_7b(),
        name="llava-13b",
        text_width=5120,
        text_mlp=13_824,
        text_layers=40,
        text_heads=40,
        text_kv_heads=40,
    )


def to_transformers(config: ModelConfig) -> "LlavaConfig":
    """Return the same shape as transformers spells it."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_mlp,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.vision_width * 3 // 4,  # unused by LLaVA; 768 as CLIP ViT-L says
        hidden_act=config.vision_act,
    )
    text = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        intermediate_size=config.text_mlp,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        num_key_value_heads=config.text_kv_heads,
        max_position_embeddings=config.max_positions,
        initializer_range=config.init_std,
        rms_norm_eps=1e-5,  # Llama-2's; transformers' default is that of the first Llama
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=config.image_token_id,
        image_seq_length=config.num_image_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=config.feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
