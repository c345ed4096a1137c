# SPDX-License-Identifier: Apache-2.0
"""What a training stage is: dataset@v + a model -> a model. All of it but the budget and how it
fits into memory (`PLACED`) is the result's identity."""

from dataclasses import dataclass, field
from typing import Final, Literal

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.model.conversation import TemplateName
from sg4v_ray.model.freeze import FreezePlan
from sg4v_ray.model.geometry import Geometry

_COUNTS: Final = (
    *("global_batch", "micro_batch", "micro_tokens", "max_length", "save_every_steps"),
    *("max_steps", "held_out_every_steps", "rollback_after_skips"),
)
PLACED: Final = (
    *("micro_batch", "micro_tokens", "zero_stage", "gradient_checkpointing"),
    "save_every_steps",
)
"""Fields that say how a stage fits into memory and time. They change no step but by rounding, so a
run that ran out of memory goes on with others."""
StageKind = Literal["align", "captioner", "pretrain", "finetune"]


@identity_keys(
    "StageConfig",
    excluded=("budget", *PLACED),
    kind="kind",
    template="template",
    geometry="geometry",
    trainable="trainable",
    learning_rate="learning_rate",
    global_batch="global_batch",
    micro_batch="micro_batch",
    length_window="length_window",
    micro_tokens="micro_tokens",
    epochs="epochs",
    max_steps="max_steps",
    warmup_ratio="warmup_ratio",
    vision_layer_decay="vision_layer_decay",
    weight_decay="weight_decay",
    betas="betas",
    epsilon="epsilon",
    clip_norm="clip_norm",
    spike_factor="spike_factor",
    rollback_after_skips="rollback_after_skips",
    max_length="max_length",
    dtype="dtype",
    export_dtype="export_dtype",
    zero_stage="zero_stage",
    gradient_checkpointing="gradient_checkpointing",
    save_every_steps="save_every_steps",
    held_out_every_steps="held_out_every_steps",
    export_checkpoint="export_checkpoint",
    seed="seed",
    image_limits="image_limits",
    budget="budget",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One training stage.

    Defaults are those of the published scripts (ShareGPT4Omni/ShareGPT4V@b6f70e9,
    scripts/sharegpt4v) unless a field says otherwise.
    """

    kind: StageKind
    """Which of the four trainings this is, for people; nothing is decided by it."""
    template: TemplateName
    geometry: Geometry
    trainable: FreezePlan
    """Which parameters learn."""
    learning_rate: float
    """The peak."""
    global_batch: int
    """Samples of one optimizer step, over all workers and accumulation steps."""
    micro_batch: int
    """Samples that one worker holds at once; the rest is accumulation."""
    length_window: int = 16
    """Global batches whose samples are sorted by length together, images apart from text; 0 sorts
    nothing. (Published: random for pretraining, sorted inside a global batch for fine-tuning.)"""
    micro_tokens: int | None = None
    """Tokens that one worker holds at once, at most, padding included; `micro_batch` still bounds
    the samples. Ours."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Overrules `epochs`."""
    warmup_ratio: float = 0.03
    vision_layer_decay: float | None = None
    """Factor of the learning rate from one vision block to the one before it, so that the first
    blocks learn least. (Published: none. The authors' advice for a tower that is open from its
    first block: InternLM-XComposer issue 195.)"""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip_norm: float | None = None
    """Gradient norm above which gradients are scaled down. The published ZeRO-2 and ZeRO-3
    settings name none."""
    spike_factor: float | None = None
    """A step whose loss is more than so many times the median of the last 64 is not applied. One
    whose loss or gradient is not finite never is. (Published: neither. PaLM, section 5.1.)"""
    rollback_after_skips: int = 3
    """Steps not applied in a row after which the weights of the last checkpoint take their place,
    and training goes on with the data that comes next. Ours."""
    max_length: int = 2048
    """Tokens of a row, image tokens included; the rest of an answer is cut. (Published: 2048
    before an image's one placeholder becomes 576 tokens.)"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations; the optimizer's copy is float32 in both cases."""
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the finished model's weights on disk."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    save_every_steps: int = 250
    """Steps between checkpoints, 40 minutes at 7B on 16 A100s. (Published: 50,000, so none.)"""
    held_out_every_steps: int | None = None
    """Steps between looks at the loss of samples that are not trained on; until the run ends the
    checkpoint with the least of it is kept. Needs a `held_out` dataset. (Published: none.)"""
    export_checkpoint: Literal["last", "best"] = "last"
    """Which weights the finished model has: those of the last step, or those with the least
    held-out loss, which then are saved at each look that is the best so far."""
    seed: int = 42
    """Order of the samples; transformers' default."""
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    budget: RejectBudget = field(default_factory=RejectBudget)

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.global_batch % self.micro_batch:
            raise ConfigError(
                f"global_batch {self.global_batch} is no multiple of micro_batch {self.micro_batch}"
            )
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ConfigError(
                "zero_stage 0 keeps no float32 copy of bfloat16 weights; set 1, which is "
                "the same on one worker and takes less memory on several"
            )
        if self.length_window < 0 or (self.micro_tokens and not self.length_window):
            raise ConfigError(
                f"length_window must be 0 or more, and above 0 with micro_tokens; got "
                f"{self.length_window}"
            )
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ConfigError(
                f"spike_factor must be above 1, got {self.spike_factor}; 3 leaves out spikes alone"
            )
        if self.export_checkpoint == "best" and self.held_out_every_steps is None:
            raise ConfigError(
                "export_checkpoint 'best' needs held_out_every_steps, got None; set it (and a "
                "held_out dataset), or export the 'last'"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio must be between 0 and 1, got {self.warmup_ratio}")
        if self.vision_layer_decay is not None and not 0 < self.vision_layer_decay <= 1:
            raise ConfigError(
                f"vision_layer_decay must be above 0 and at most 1, got {self.vision_layer_decay}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be at least 0 and below 1, got {self.betas}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must not be negative, got {self.weight_decay}")

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "epochs", "epsilon", "clip_norm"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")


@identity_keys(
    "Fresh",
    excluded=("tokenizer_file",),
    model="model",
    tokenizer_file="tokenizer_file",
    seed="seed",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class Fresh:
    """A model with random weights, for the nano, where nothing is pretrained."""

    model: ModelConfig
    tokenizer_file: str
    """Absolute path of a `tokenizer.json` on the driver. Its content is identity, its place not."""
    seed: int
