# SPDX-License-Identifier: Apache-2.0
"""A model folder of ours -> a folder for others: llava-hf's layout, or the published one.

The published layout is what ShareGPT4V's and LLaVA's own code load: the language model with the
projector, and the vision tower in the folder `vision_tower`. It knows neither `<image>` nor
`<pad>`, so their rows are cut. Both can be imported again, to the bit.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import CLIPImageProcessor

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model import convert, published, weights
from sg4v_ray.model.config import ModelConfig, to_transformers
from sg4v_ray.model.importing import TOWER_FOLDER
from sg4v_ray.model.source_files import read_folder, read_json

Layout = Literal["llava-hf", "published"]

_SHARD_SIZE: Final = "5GB"
_OURS: Final = ("<image>", "<pad>")
_TOKENIZER: Final = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 writes one that 4 lacks
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",  # Source: share4v/train/train.py, for v1 and plain
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
}


def export_model(folder: Path, model: ModelConfig, *, layout: Layout, to: Path) -> None:
    """Write a model folder in another layout; it appears whole or not at all.

    ShareGPT4V's loader wants 'sharegpt4v' in the name of the folder, and finds `vision_tower`
    when it runs there; elsewhere set mm_vision_tower in config.json. Its slow tokenizer wants
    Vicuna's tokenizer.model, which no artifact of ours has: copy it to the folder.

    Args:
        folder: a finished model artifact's, already compared with its checksums.
        model: its shape.
        layout: of what is written.
        to: absent or empty.

    Raises:
        ConfigError: `to` has files, or the model cannot be said in this layout.
        WeightsError: the folder does not fit `model`.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is not an empty folder; give another one, nothing is overwritten")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        made = Path(scratch) / "made"
        if layout == "llava-hf":
            shutil.copytree(folder, made)
        else:
            _write_published(folder, model, made)
        os.rename(made, to)


def _write_published(folder: Path, model: ModelConfig, made: Path) -> None:
    found = read_folder(folder)
    expected = convert.renamed(convert.blank(model).state_dict(), weights.LLAVA_HF)
    advice = "Its manifest belongs to other weights; import or train the model again."
    convert.check(found, expected, source=str(folder), advice=advice)
    state = convert.renamed(found, convert.reverse(weights.LLAVA_HF))
    state = convert.cut_rows(state, model)
    dtype = str(state["lm_head.weight"].dtype).removeprefix("torch.")
    _write_tensors(convert.renamed(state, convert.PROJECTOR + convert.LANGUAGE), made)
    pads = published.read_pixels(folder).get("do_pad", True)
    fields = published.llava_fields(model, dtype=dtype, geometry="pad" if pads else "square")
    (made / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    _write_tokenizer(folder, model, made)
    _write_tower(convert.renamed(state, convert.TOWER), model, made / TOWER_FOLDER)


def _write_tensors(state: Mapping[str, Tensor], made: Path) -> None:
    made.mkdir()
    whole = {name: value.contiguous() for name, value in state.items()}
    save_torch_state_dict(whole, made, max_shard_size=_SHARD_SIZE, metadata={"format": "pt"})


def _write_tower(state: Mapping[str, Tensor], model: ModelConfig, made: Path) -> None:
    _write_tensors(state, made)
    vision = to_transformers(model).vision_config
    vision.architectures = ["CLIPVisionModel"]
    vision.save_pretrained(made)
    size = model.image_size
    CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(model.image_mean),
        image_std=list(model.image_std),
    ).save_pretrained(made)


def _write_tokenizer(folder: Path, model: ModelConfig, made: Path) -> None:
    """Write the tokenizer as it was before `<image>` and `<pad>` came to it."""
    fields = read_json(folder / "tokenizer.json")
    fields["added_tokens"] = [one for one in fields["added_tokens"] if one["content"] not in _OURS]
    (made / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    settings = _TOKENIZER | {"model_max_length": model.max_positions}
    (made / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
