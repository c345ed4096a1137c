# SPDX-License-Identifier: Apache-2.0
"""open_clip's ViT <-> CLIPVisionModel: names, tensors and config.

The two are one architecture: open_clip keeps query, key and value of a block in one matrix. Its
towers of other kinds (timm, ResNet, attention pooling, layer scale) are not, and are refused.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from sg4v_ray.core.errors import ConfigError

CONFIG: Final = "open_clip_config.json"
WEIGHTS: Final = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Files of a folder that open_clip publishes."""

_OUTSIDE: Final = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # transformers spells it so
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
)
_IN_BLOCK: Final = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
_JOINT: Final = ".attn.in_proj_"
_APART: Final = (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")
# The text tower of either class (CLIP, CustomTextCLIP), and what comes after both towers.
_NOT_VISION: Final = (
    "positional_embedding", "token_embedding.", "transformer.", "ln_final.", "text.",
    "text_projection", "attn_mask", "logit_scale", "logit_bias", "visual.proj",
)  # fmt: skip
# Source: open_clip 3.3, CLIPVisionCfg. These change no hidden state of an evaluated tower...
_HARMLESS: Final = (
    "patch_dropout", "output_tokens", "pool_type", "final_ln_after_pool", "pos_embed_type",
)  # fmt: skip
# ... and these are the numbers, with its defaults.
_NUMBERS: Final = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
    "image_size": 224,
}  # fmt: skip


def drop_text(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the text tower and the last projection, by name."""
    return {name: value for name, value in found.items() if not name.startswith(_NOT_VISION)}


def to_clip(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a `visual.*` state under the names of CLIPVisionModel."""
    state: dict[str, Tensor] = {}
    for name, value in found.items():
        new = _replaced(name, _OUTSIDE)
        if _JOINT in new:
            block, kind = new.split(_JOINT)
            for one, part in zip(_APART, value.chunk(3), strict=True):
                state[f"{block}{one}{kind}"] = part.clone()  # safetensors writes no views
        else:
            state[_replaced(new, _IN_BLOCK)] = value
    return state


def from_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIPVisionModel's state under the names of open_clip: the inverse of `to_clip`."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        new = _replaced(name, tuple((theirs, ours) for ours, theirs in _OUTSIDE))
        query, key, val = _APART
        if query in new:
            parts = [value, *(state[name.replace(query, one)] for one in (key, val))]
            found[new.replace(query, _JOINT)] = torch.cat(parts)
        elif key not in new and val not in new:
            found[_replaced(new, tuple((theirs, ours) for ours, theirs in _IN_BLOCK))] = value
    return found


def vision_config(fields: Mapping[str, Any], *, where: str) -> CLIPVisionConfig:
    """Return the shape of the tower that an open_clip_config.json describes.

    Raises:
        ConfigError: the tower is none that CLIPVisionModel can be.
    """
    model = fields.get("model_cfg") or {}
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict):
        raise ConfigError(f"{where} has no model_cfg.vision_cfg; give a folder of open_clip's")
    for name, value in vision.items():
        if value and name not in (*_NUMBERS, *_HARMLESS):
            raise ConfigError(
                f"{where}: vision_cfg.{name} is {value!r}; only a plain ViT without it can become "
                "a CLIPVisionModel, such as ViT-L-14-336"
            )
    given = _NUMBERS | {name: vision[name] for name in _NUMBERS if name in vision}
    for name, value in given.items():
        if not isinstance(value, int | float):
            raise ConfigError(
                f"{where}: vision_cfg.{name} is {value!r}; it must be one number, as in a ViT on "
                "square images"
            )
    width = given["width"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * given["mlp_ratio"]),
        num_hidden_layers=given["layers"],
        num_attention_heads=width // given["head_width"],
        image_size=given["image_size"],
        patch_size=given["patch_size"],
        hidden_act="quick_gelu" if model.get("quick_gelu", False) else "gelu",
    )


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if old in name:
            return name.replace(old, new, 1)
    return name
