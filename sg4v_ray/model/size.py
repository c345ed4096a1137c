# SPDX-License-Identifier: Apache-2.0
"""What a model costs, from its config alone: parameters, FLOPs, bytes of activations and KV cache.

The formulas are those of `transformers`' LLaVA with sdpa attention, which keeps no T x T scores.
Tests hold them against allocated parameters, torch's FLOP counter and the tensors that a training
step keeps alive, up to the 7B model on fake tensors.
"""

# Letters used in this file:
#   T  tokens of a row, image tokens included    S  tokens of an image in the tower, class token too
#   D  width    F  width inside an MLP    b  bytes of a number

from dataclasses import dataclass
from typing import Final

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.model.freeze import FreezePlan

_FLOAT32: Final = 4
"""Bytes: the loss and the inside of Llama's norms are float32 in any case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameters of each part."""

    vision_tower: int
    projector: int
    language_model: int
    """With its embedding, without the head."""
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision_tower + self.projector + self.language_model + self.head


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Floating-point operations of one training sample; a multiply and an add are two."""

    forward: float
    backward: float
    """Without what frozen parts do not need."""
    recompute: float
    """The second forward pass of activation checkpointing."""

    @property
    def model(self) -> float:
        """What training needs: the numerator of MFU (PaLM, Chowdhery et al. 2022, appendix B)."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What the GPU does: the numerator of the hardware FLOPs utilisation (same source)."""
        return self.model + self.recompute


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of one micro-batch that are not weights."""

    vision: int
    """Kept for the backward pass by the vision tower and the projector."""
    language: int
    """Kept by the language model."""
    loss: int
    """Kept by the loss: log-probabilities in float32."""
    working: int
    """Held for a moment beside these: copies of the logits, or a block that is computed again."""

    @property
    def kept(self) -> int:
        """At the end of the forward pass."""
        return self.vision + self.language + self.loss

    @property
    def peak(self) -> int:
        """At the worst moment."""
        return self.kept + self.working


def count_parameters(config: ModelConfig) -> Parameters:
    """Return what transformers will allocate."""
    return Parameters(
        vision_tower=_tower_embeddings(config)
        + config.vision_layers * _vision_block(config)
        + 2 * config.vision_width,
        projector=_linear(config.vision_width, config.text_width)
        + _linear(config.text_width, config.text_width),
        language_model=_language_model(config),
        head=config.vocab_size * config.text_width,
    )


def count_trainable(config: ModelConfig, plan: FreezePlan) -> Parameters:
    """Return how many parameters of each part train; `freeze.trainable` names the same ones.

    Raises:
        ConfigError: the tower has no block `vision_from_block` that gets a gradient.
    """
    every = count_parameters(config)
    tower = len(_trained_blocks(config, plan)) * _vision_block(config)
    if plan.vision_embeddings:
        tower += _tower_embeddings(config)
    return Parameters(
        vision_tower=tower,
        projector=every.projector if plan.projector else 0,
        language_model=every.language_model if plan.language_model else 0,
        head=every.head if plan.language_model else 0,
    )


def count_flops(
    config: ModelConfig,
    plan: FreezePlan,
    *,
    text_tokens: float,
    images: float,
    checkpointing: bool,
) -> Flops:
    """Return the FLOPs of training on one sample.

    Args:
        config: the model.
        plan: what trains. A matrix costs its forward pass once more for the gradient of its input
            and once more for its own; frozen ones save the latter, and what lies before the first
            trained part saves both.
        text_tokens: of the sample, image tokens not included.
        images: of the sample; a mean may be a fraction.
        checkpointing: blocks that the gradient passes are computed again, but for their last
            matrix, where torch stops early because nothing after it is needed.

    Source:
        PaLM (Chowdhery et al. 2022, appendix B): 2 FLOPs a weight and token, 4 T D a token and
        layer for attention (not halved for the causal mask), backward twice the forward. The whole
        tower runs, also the block behind the layer that features are taken from.
    """
    text = _text_flops(config, plan, text_tokens + images * config.num_image_tokens)
    vision = _vision_flops(config, plan)
    return Flops(
        forward=text.forward + images * vision.forward,
        backward=text.backward + images * vision.backward,
        recompute=text.recompute + images * vision.recompute if checkpointing else 0.0,
    )


def kv_cache_bytes(config: ModelConfig, *, number_bytes: int = 2) -> int:
    """Return the KV-cache bytes of one token: a key and a value in each layer.

    Source:
        Kwon et al. 2023 (PagedAttention), section 3: 2 x layers x width x bytes a number.
    """
    return 2 * config.text_layers * _keys(config) * number_bytes


def count_activations(
    config: ModelConfig,
    plan: FreezePlan,
    *,
    tokens: int,
    images: int,
    number_bytes: int,
    checkpointing: bool,
) -> Activations:
    """Return the bytes of activations of one micro-batch.

    Args:
        config: the model.
        plan: what trains; frozen matrices do not need their inputs.
        tokens: of all rows, image tokens and padding included.
        images: of all rows.
        number_bytes: 2 for bfloat16, 4 for float32.
        checkpointing: each block keeps its input only.

    Source:
        The method is that of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
        Transformer Models", section 4: what each operation keeps for its gradient. Numbers differ,
        because Llama and CLIP differ from GPT: see the functions below. Masks of T x T bools and
        position embeddings, which all layers share, are left out: below 1% at 7B.
    """
    b, width, passed = number_bytes, config.text_width, _blocks_passed(config, plan)
    block = tokens * _text_block_kept(config, b, trains=plan.language_model)
    inputs = tokens * b * width
    last = tokens * (_norm_kept(config, b, plan.language_model) + b * width * plan.language_model)
    tower_block = images * _tower_block_kept(config, b)
    tower_inputs = images * (config.num_image_tokens + 1) * b * config.vision_width
    projector = images * config.num_image_tokens * b * (config.vision_width + 2 * width)
    loss = tokens * _FLOAT32 * config.vocab_size
    # The gradient of the log-probabilities and that of the logits, both float32.
    working = 2 * loss
    if checkpointing:
        working = max(working, block, tower_block if passed else 0)
    return Activations(
        vision=passed * (tower_inputs if checkpointing else tower_block)
        + (projector if plan.projector or passed else 0),
        language=config.text_layers * (inputs if checkpointing else block) + last,
        loss=loss,
        working=working,
    )


def _text_flops(config: ModelConfig, plan: FreezePlan, T: float) -> Flops:
    """Return the FLOPs of the language model and its head on one row."""
    D, layers = config.text_width, config.text_layers
    matrices, head = T * _text_matrix_flops(config), 2 * T * config.vocab_size * D
    attention = 4 * T * T * D
    factor = 2 if plan.language_model else 1
    return Flops(
        forward=layers * (matrices + attention) + head,
        backward=layers * (factor * matrices + 2 * attention) + factor * head,
        recompute=layers * (matrices + attention - 2 * T * D * config.text_mlp),
    )


def _vision_flops(config: ModelConfig, plan: FreezePlan) -> Flops:
    """Return the FLOPs of the vision tower and the projector on one image."""
    S, D, F = config.num_image_tokens + 1, config.vision_width, config.vision_mlp
    passed = _blocks_passed(config, plan)
    block = 2 * S * (4 * D * D + 2 * D * F) + 4 * S * S * D
    patches = 2 * config.num_image_tokens * 3 * config.patch_size**2 * D
    first, second = (
        2 * config.num_image_tokens * width * config.text_width for width in (D, config.text_width)
    )
    trains, passes = plan.projector, passed > 0
    projector = first * (trains + passes) + second * (trains + (trains or passes))
    return Flops(
        forward=config.vision_layers * block + patches + first + second,
        backward=2 * passed * block + projector + patches * plan.vision_embeddings,
        recompute=passed * (block - 2 * S * D * F),
    )


def _text_block_kept(config: ModelConfig, b: int, *, trains: bool) -> int:
    """Return the bytes a token that a Llama block keeps: 24 D + 8 F in bfloat16, if it trains.

    Two norms and what they give to matrices, queries, keys, values and the attention's output
    (flash attention keeps its row sums in float32), and in the MLP gate, its SiLU, up, product.
    """
    width, into_matrices = config.text_width, b if trains else 0
    norms = 2 * (_norm_kept(config, b, trains) + into_matrices * width)
    # Masked rows repeat the keys for every query head: sdpa takes grouped ones without a mask only.
    attention = 4 * b * width + _FLOAT32 * config.text_heads
    return norms + attention + (3 * b + into_matrices) * config.text_mlp


def _norm_kept(config: ModelConfig, b: int, trains: bool) -> int:
    """Return the bytes a token of a Llama norm: its input in float32, and itself unscaled."""
    return (_FLOAT32 + (b if trains else 0)) * config.text_width + _FLOAT32


def _tower_block_kept(config: ModelConfig, b: int) -> int:
    """Return the bytes an image that a CLIP block keeps while it trains: S (8 b D + 3 b F).

    Two norms' inputs and outputs, queries, keys, values, the attention's output; in the MLP the
    input of QuickGELU, its sigmoid and the product.
    """
    one = 8 * config.vision_width + 3 * config.vision_mlp
    return (config.num_image_tokens + 1) * (b * one + _FLOAT32 * config.vision_heads)


def _trained_blocks(config: ModelConfig, plan: FreezePlan) -> range:
    first, used = plan.vision_from_block, config.used_vision_layers
    if first is None:
        return range(0)
    if first >= used:
        raise ConfigError(
            f"vision_from_block is {first}, but only the blocks 0 to {used - 1} of this vision "
            "tower reach the language model"
        )
    return range(first, used)


def _blocks_passed(config: ModelConfig, plan: FreezePlan) -> int:
    """Return how many vision blocks the gradient passes, trained or not."""
    if plan.vision_embeddings:
        return config.used_vision_layers
    return len(_trained_blocks(config, plan))


def _tower_embeddings(config: ModelConfig) -> int:
    """Class token, patches, positions and the norm before the blocks."""
    width = config.vision_width
    patches = 3 * config.patch_size**2 * width
    return width + patches + (config.num_image_tokens + 1) * width + 2 * width


def _vision_block(config: ModelConfig) -> int:
    width, mlp = config.vision_width, config.vision_mlp
    return 4 * _linear(width, width) + _linear(width, mlp) + _linear(mlp, width) + 4 * width


def _language_model(config: ModelConfig) -> int:
    width = config.text_width
    blocks = config.text_layers * (_text_matrix_flops(config) // 2 + 2 * width)
    return config.vocab_size * width + blocks + width


def _text_matrix_flops(config: ModelConfig) -> int:
    """Return the forward FLOPs a token of one Llama block's matrices: two for each weight."""
    width = config.text_width
    return 2 * (2 * width * width + 2 * width * _keys(config) + 3 * width * config.text_mlp)


def _keys(config: ModelConfig) -> int:
    return config.text_width // config.text_heads * config.text_kv_heads


def _linear(inputs: int, outputs: int) -> int:
    """Weights and biases."""
    return inputs * outputs + outputs
