# SPDX-License-Identifier: Apache-2.0
"""Names and tensors of a model in each layout, both ways; pure functions on state dicts.

A state has the names of `LlavaForConditionalGeneration.state_dict()`. What a source must hold is
never written down twice: it is the model itself, on the meta device, put into the source's layout.
"""

import hashlib
from collections.abc import Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from sg4v_ray.core.errors import ConfigError, WeightsError
from sg4v_ray.model.config import ModelConfig, to_transformers
from sg4v_ray.model.weights import LLAVA_HF, listed

Table: TypeAlias = tuple[tuple[str, str], ...]
"""Pairs of prefixes, ours and theirs; the first that fits is used."""
State: TypeAlias = dict[str, Tensor]

PROJECTOR: Final[Table] = (
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
)
"""LLaVA's `mlp2x_gelu`: a Sequential whose number 1 is the GELU."""
TOWER_INSIDE: Final[Table] = (
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)
"""Where a LLaVA checkpoint keeps the tower, if it keeps one."""
LANGUAGE: Final[Table] = (("model.language_model.", "model."), ("lm_head.", "lm_head."))
"""LlamaForCausalLM, so Vicuna too."""
TOWER: Final[Table] = (("model.vision_tower.", "vision_model."),)
"""CLIPVisionModel in a folder of its own."""

# Source: of all names in CLIPModel's state dict those that no picture passes through.
_TEXT_TOWER: Final = (
    "text_model.", "text_projection.weight", "visual_projection.weight", "logit_scale",
)  # fmt: skip
# Buffers that older transformers wrote and any can compute.
_BUFFERS: Final = (".embeddings.position_ids", ".self_attn.rotary_emb.inv_freq")
_VOCABULARY: Final = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_ROW_MULTIPLE: Final = 64
"""To which llava-hf pads the vocabulary."""
_CLASS: Final = "embeddings.class_embedding"


def blank(config: ModelConfig) -> LlavaForConditionalGeneration:
    """Return a model without memory: its state has names and shapes only."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(to_transformers(config))


def reverse(table: Table) -> Table:
    """Return the table of the other direction."""
    return tuple((theirs, ours) for ours, theirs in table)


def renamed(state: Mapping[str, Tensor], table: Table) -> State:
    """Return those tensors whose names the table knows, under their new names."""
    result: State = {}
    for name, value in state.items():
        for old, new in table:
            if name.startswith(old):
                result[new + name.removeprefix(old)] = value
                break
    return result


def check(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, advice: str
) -> None:
    """Compare names and shapes with what a source must hold.

    Args:
        found: of the source.
        expected: tensors of the right shapes; they may be on the meta device.
        source: what the error is about.
        advice: a sentence that says what to do.

    Raises:
        WeightsError: keys are missing, extra or misshapen; it lists them.
    """
    problems = [
        listed("missing", set(expected) - set(found)),
        listed("extra", set(found) - set(expected)),
        listed(
            "misshapen",
            [
                f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
                for name, value in expected.items()
                if name in found and found[name].shape != value.shape
            ],
        ),
    ]
    if any(problems):
        raise WeightsError(
            f"{source} is not what its config says: {'; '.join(filter(None, problems))}. {advice}"
        )


def drop_buffers(found: Mapping[str, Tensor]) -> State:
    """Leave out what older transformers saved although it follows from the config."""
    return {name: value for name, value in found.items() if not f".{name}".endswith(_BUFFERS)}


def drop_text_tower(found: Mapping[str, Tensor]) -> State:
    """Leave out of a CLIPModel what belongs to its text tower, by name."""
    return {name: value for name, value in found.items() if not name.startswith(_TEXT_TOWER)}


def with_vision_model(found: Mapping[str, Tensor], prefix: str = "") -> State:
    """Put back the `vision_model.` that transformers 5 leaves out when it saves a tower."""
    if f"{prefix}{_CLASS}" not in found:
        return dict(found)
    return {
        f"{prefix}vision_model.{name.removeprefix(prefix)}"
        if name.startswith(prefix)
        else name: one
        for name, one in found.items()
    }


def padded_rows(num_tokens: int) -> int:
    """Return the vocabulary of a model whose text tokenizer has so many tokens.

    `<image>` and `<pad>` follow them. Vicuna's 32,000 become 32,064, as in llava-hf.
    """
    return -(-(num_tokens + 2) // _ROW_MULTIPLE) * _ROW_MULTIPLE


def pad_rows(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """Give embedding and head a row for each token of `config`; new rows are the mean of the old.

    Source: llava-hf's conversion draws new rows from a normal distribution around the mean. Ours
    are the mean itself, summed in float64 and rounded once, so that two imports are equal.
    """
    return dict(state) | {name: _padded(state[name], config.vocab_size) for name in _VOCABULARY}


def cut_rows(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """Cut embedding and head back to the text tokens: the inverse of `pad_rows`.

    Raises:
        ConfigError: `<image>` and `<pad>` are not the last two tokens, so that a cut would take
            text tokens with it, or miss some.
    """
    rows, expected = config.image_token_id, padded_rows(config.image_token_id)
    if config.pad_token_id != rows + 1 or config.vocab_size != expected:
        raise ConfigError(
            f"{config.name} has <image> at {rows}, <pad> at {config.pad_token_id} and "
            f"{config.vocab_size} rows; the published layout has neither token, so they must be "
            f"the last two: <pad> at {rows + 1} and {expected} rows. Use the layout llava-hf"
        )
    # Clones: safetensors writes no views.
    return dict(state) | {name: state[name][:rows].clone() for name in _VOCABULARY}


def new_projector(config: ModelConfig, *, seed: int) -> State:
    """Return a random float32 projector: normal with `init_std`, biases 0, as `weights.create`."""
    random = torch.Generator().manual_seed(seed)
    width, narrow = config.text_width, config.vision_width
    return {
        f"model.multi_modal_projector.{layer}.{kind}": value
        for layer, inputs in (("linear_1", narrow), ("linear_2", width))
        for kind, value in (
            ("weight", torch.randn(width, inputs, generator=random) * config.init_std),
            ("bias", torch.zeros(width)),
        )
    }


def tower_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the vision tower: of names, dtypes, shapes and bytes, in key order.

    The same weights under our names, llava-hf's or CLIPVisionModel's give the same hash; in
    another dtype they do not.

    Raises:
        WeightsError: there is no vision tower in the state.
    """
    names = (*TOWER, *((theirs, "vision_model.") for _, theirs in LLAVA_HF[:1]))
    tower = renamed(state, (*names, ("vision_model.", "vision_model.")))
    if not tower:
        raise WeightsError("no vision tower in this state; give the state dict of a whole model")
    digest = hashlib.sha256()
    for name in sorted(tower):
        value = tower[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _padded(old: Tensor, rows: int) -> Tensor:
    mean = old.mean(dim=0, dtype=torch.float64).to(old.dtype)
    return torch.cat([old, mean.expand(rows - len(old), -1)])
