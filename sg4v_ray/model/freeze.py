# SPDX-License-Identifier: Apache-2.0
"""Which parameters a training stage changes.

Features are taken before the end of the vision tower, so its last block and its post_layernorm
never get a gradient. They are in no plan: an optimizer that holds them only wastes memory, and
DeepSpeed waits for gradients that do not come.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys

if TYPE_CHECKING:  # recipes hold plans and must not import torch
    from transformers import LlavaForConditionalGeneration

_TOWER: Final = "model.vision_tower."
_BLOCKS: Final = "model.vision_tower.encoder.layers."


@identity_keys(
    "FreezePlan",
    projector="projector",
    language_model="language_model",
    vision_from_block="vision_from_block",
    vision_embeddings="vision_embeddings",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class FreezePlan:
    """The parts that train; all others are frozen."""

    projector: bool
    language_model: bool
    """With its embedding and its head."""
    vision_from_block: int | None
    """First vision block that trains, counted from 0; None freezes the tower."""
    vision_embeddings: bool = False
    """Train what comes before the blocks as well: for towers that were never pretrained."""

    def __post_init__(self) -> None:
        if not (self.projector or self.language_model or self.vision_embeddings) and (
            self.vision_from_block is None
        ):
            raise ConfigError("the plan freezes everything; set at least one part to train")
        if self.vision_from_block is not None and self.vision_from_block < 0:
            raise ConfigError(
                f"vision_from_block counts from 0, got {self.vision_from_block}; use None to "
                "freeze the vision tower"
            )


ALIGN: Final = FreezePlan(projector=True, language_model=False, vision_from_block=None)
"""A new projector learns to speak to a frozen language model."""
PRETRAIN: Final = FreezePlan(projector=True, language_model=True, vision_from_block=12)
"""ShareGPT4V's: the latter half of the 24 blocks of CLIP-L as well."""
CAPTIONER: Final = PRETRAIN
"""Ours: the published captioner is of another architecture."""
FINETUNE: Final = FreezePlan(projector=True, language_model=True, vision_from_block=None)
"""ShareGPT4V's: the vision tower is frozen again."""


def trainable(model: "LlavaForConditionalGeneration", parts: FreezePlan) -> tuple[str, ...]:
    """Return the names of the parameters that train, in the model's order.

    Raises:
        ConfigError: the tower has no block `vision_from_block` that gets a gradient.
    """
    first = parts.vision_from_block
    used = _used_blocks(model)
    if first is not None and first >= used:
        raise ConfigError(
            f"vision_from_block is {first}, but only the blocks 0 to {used - 1} of this vision "
            "tower reach the language model"
        )
    dead = set(dead_parameters(model))
    return tuple(
        name for name, _ in model.named_parameters() if name not in dead and _trains(name, parts)
    )


def freeze(model: "LlavaForConditionalGeneration", parts: FreezePlan) -> tuple[str, ...]:
    """Set `requires_grad` as the plan says; return the names of what trains."""
    names = trainable(model, parts)
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return names


def dead_parameters(model: "LlavaForConditionalGeneration") -> tuple[str, ...]:
    """Return the names of parameters behind the layer that features are taken from."""
    used = _used_blocks(model)
    return tuple(
        name
        for name, _ in model.named_parameters()
        if name.startswith(f"{_TOWER}post_layernorm.") or _block(name, default=-1) >= used
    )


def vision_depth(name: str) -> int | None:
    """Return how deep in the vision tower a parameter lies: 0 before its blocks; None outside."""
    if not name.startswith(_TOWER):
        return None
    return 1 + _block(name, default=-1)


def _trains(name: str, parts: FreezePlan) -> bool:
    if name.startswith("model.multi_modal_projector."):
        return parts.projector
    if not name.startswith(_TOWER):
        return parts.language_model
    if name.startswith(_BLOCKS):
        first = parts.vision_from_block
        return first is not None and _block(name, default=-1) >= first
    return parts.vision_embeddings


def _used_blocks(model: "LlavaForConditionalGeneration") -> int:
    # Hidden state 0 is what enters block 0, and -1 is what leaves the last block.
    blocks = model.config.vision_config.num_hidden_layers
    return int(blocks + 1 + model.config.vision_feature_layer)


def _block(name: str, *, default: int) -> int:
    """Return the index of the vision block that a parameter belongs to."""
    if not name.startswith(_BLOCKS):
        return default
    return int(name.removeprefix(_BLOCKS).split(".")[0])
