# SPDX-License-Identifier: Apache-2.0
"""Make, read and write weights; on disk always in the layout of the published llava-hf models.

transformers, vLLM and SGLang all load that layout. Every missing, extra or misshapen key is an
error: a half-loaded model still produces text.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, LlavaForConditionalGeneration

from sg4v_ray.core.errors import ConfigError, WeightsError
from sg4v_ray.model.config import ModelConfig, to_transformers

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LLAVA_HF: Final = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""From names inside transformers 5 to the published ones. Its own save_pretrained leaves out
`vision_model.`, and vLLM then finds no vision tower."""
_SHARD_SIZE: Final = "5GB"
_NAMED_KEYS: Final = 5


def to_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a config's name.

    Raises:
        ConfigError: weights are not kept in such a type.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def create(config: ModelConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """Return a float32 model with random weights (CLIP's and Llama's initialisation)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(to_transformers(config))


def load(folder: Path, *, dtype: str | None) -> LlavaForConditionalGeneration:
    """Return the model of a folder, in eval mode on the CPU.

    Args:
        folder: in the layout of llava-hf.
        dtype: of the weights, or None for that of the files. Weights of the files' dtype are the
            files, mapped: all processes of a node share them, and one that writes into them has
            its own copy. Of another dtype they are a copy.

    Raises:
        WeightsError: there are no safetensors (pickled weights are never opened), or keys are
            missing, extra or of another shape than config.json says.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder} needs config.json and *.safetensors; pickled checkpoints are not opened, "
            "convert them first"
        )
    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder,
        dtype="auto" if dtype is None else to_dtype(dtype),
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that all of them are listed, not to load any
        output_loading_info=True,
    )
    problems = [
        listed("missing", report["missing_keys"]),
        listed("extra", report["unexpected_keys"]),
        listed("misshapen", [" ".join(map(str, one)) for one in report["mismatched_keys"]]),
    ]
    if any(problems):
        raise WeightsError(
            f"{folder} does not fit its config.json: {'; '.join(filter(None, problems))}"
        )
    return model.eval()


def save(
    model: LlavaForConditionalGeneration,
    folder: Path,
    *,
    dtype: str,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json, generation_config.json and safetensors in shards of 5 GB.

    Args:
        model: what to save.
        folder: made if absent.
        dtype: of the weights on disk.
        state: the model's state dict, where the model itself holds only a part (ZeRO-3).
    """
    kind = to_dtype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict() if state is None else state
    published = {_published(name): value.to(kind).contiguous() for name, value in tensors.items()}
    save_torch_state_dict(published, folder, max_shard_size=_SHARD_SIZE, metadata={"format": "pt"})
    fields = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": dtype}
    type(model.config).from_dict(fields).save_pretrained(folder)
    text = model.config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    ).save_pretrained(folder)


def _published(name: str) -> str:
    for ours, theirs in LLAVA_HF:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise WeightsError(f"{name} is no weight of a LLaVA model; save the bare model, not a wrapper")


def listed(what: str, keys: Iterable[str]) -> str:
    """Return `what` and the first five of the keys, or '' if there are none."""
    names = sorted(keys)
    if not names:
        return ""
    rest = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return f"{what} {', '.join(names[:_NAMED_KEYS])}{rest}"
