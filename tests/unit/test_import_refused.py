# SPDX-License-Identifier: Apache-2.0
"""Weights that are broken, or of another model, are refused before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sg4v_ray.core.errors import ConfigError, Sg4vError
from tests.unit.weight_sources import (
    State,
    in_shards,
    projector,
    run_import,
    write,
    write_published,
)

pytestmark = pytest.mark.training


def _rewrite(change: Callable[[State], object]) -> Callable[[Path], object]:
    def edit(source: Path) -> None:
        state = load_file(source / "model.safetensors")
        change(state)
        save_file({name: one.clone() for name, one in state.items()}, source / "model.safetensors")

    return edit


def _swap(state: State) -> None:
    names = [f"model.mm_projector.{number}.weight" for number in (0, 2)]
    state[names[0]], state[names[1]] = state[names[1]], state[names[0]]


def _cut_off(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _sharded(kind: str, then: Callable[[Path], object]) -> Callable[[Path], object]:
    def edit(source: Path) -> None:
        in_shards(source, load_file(source / "model.safetensors"), kind=kind)
        then(source)

    return edit


def _stray_key(source: Path) -> None:
    file = source / "model-00002-of-00002.safetensors"
    save_file(load_file(file) | {"stray": torch.ones(2)}, file)


class _Run:
    """Unpickling this would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def _pickled(payload: Any) -> Callable[[Path], object]:
    def edit(source: Path) -> None:
        (source / "model.safetensors").unlink()
        torch.save(payload, source / "pytorch_model.bin")

    return edit


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        pytest.param(
            lambda source: (source / "vision_tower").rename(source.parent / "elsewhere"),
            r"points at 'Lin-Chen/some-tower'\); download the tower and give --vision-tower PATH",
            id="missing tower",
        ),
        pytest.param(
            _rewrite(_swap),
            r"misshapen model.mm_projector.0.weight \[32, 32\] instead of \[32, 24\], .*2.weight",
            id="swapped projector",
        ),
        pytest.param(
            _rewrite(lambda state: state.update(projector(40))),
            r"misshapen model.mm_projector.0.bias \[40\] instead of \[32\]",
            id="projector of the 13B",
        ),
        pytest.param(
            _rewrite(lambda state: [state.pop(name) for name in list(state) if "mlp" in name]),
            r"missing model.layers.0.mlp.down_proj.weight, .* and 1 more. Download",
            id="missing keys",
        ),
        pytest.param(
            _rewrite(lambda state: state.update({"model.surprise": torch.ones(2)})),
            "extra model.surprise. Download the folder again",
            id="extra key",
        ),
        pytest.param(
            _rewrite(lambda state: state.update({"lm_head.weight": torch.ones(9, 32)})),
            r"misshapen lm_head.weight \[9, 32\] instead of",
            id="another vocabulary",
        ),
        pytest.param(
            _sharded("safetensors", lambda source: _cut_off(source / SECOND)),
            f"{SECOND} is cut off .* download it again",
            id="truncated safetensors",
        ),
        pytest.param(
            _sharded("bin", lambda source: _cut_off(source / "pytorch_model-00002-of-00002.bin")),
            "pytorch_model-00002-of-00002.bin cannot be read .* it is cut off",
            id="truncated bin",
        ),
        pytest.param(
            _sharded("safetensors", lambda source: (source / SECOND).unlink()),
            f"{SECOND} is missing; download it again",
            id="missing shard",
        ),
        pytest.param(
            _sharded("safetensors", _stray_key),
            f"{SECOND} does not hold what model.safetensors.index.json lists: extra stray",
            id="key that the index does not list",
        ),
        pytest.param(
            _sharded(
                "safetensors", lambda source: (source / "model.safetensors.index.json").unlink()
            ),
            "has model-00001-of-00002.safetensors but no model.safetensors.index.json",
            id="missing index",
        ),
        pytest.param(
            _sharded(
                "safetensors",
                lambda source: save_file(
                    {"a": torch.ones(2)}, source / "model-00003-of-00003.safetensors"
                ),
            ),
            "model-00003-of-00003.safetensors is no file that .* may list",
            id="shard of another download",
        ),
        pytest.param(_pickled({"b": 3}), "no state dict: it also has b. Save", id="pickled number"),
        pytest.param(_pickled([3]), "no state dict: it also has list. Save", id="pickled list"),
        pytest.param(
            _pickled({"b": _Run()}), "holds more than tensors. Nothing in it", id="pickled code"
        ),
        pytest.param(
            lambda source: (source / "model.safetensors").unlink(),
            "has no weights: no model.safetensors and no pytorch_model.bin",
            id="no weights",
        ),
        pytest.param(
            lambda source: (source / "tokenizer.json").rename(source / "tokenizer.model"),
            "import LlamaTokenizerFast as T",
            id="slow tokenizer",
        ),
        pytest.param(
            lambda source: write(source / "vision_tower/config.json", {"model_type": "siglip"}),
            "model_type is 'siglip'; a CLIP vision tower has",
            id="another tower",
        ),
    ],
)
def test_a_broken_source_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Path], object], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_published(tmp_path / "source")
    edit(tmp_path / "source")
    with pytest.raises(Sg4vError, match=says):
        run_import("published", tmp_path / "source", tmp_path / "runs")
    assert not (tmp_path / "runs/tiny/v1/manifest.json").exists()
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "internlm"}, "model_type is 'internlm'.*code of their own"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; only 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; only False"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; only 'square' or"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, but the tower .* is 24 wide"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06 in LlamaConfig; only 1e-05"),
        ({"rope_theta": 1e6}, "rope_parameters is"),
        ({"text_config": {}}, "use --kind llava-hf"),
        ({"mm_vision_select_layer": -9}, "feature_layer must be between -3 and -1, got -9"),
    ],
)
def test_a_config_that_asks_for_another_model_is_refused_by_field(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    write_published(tmp_path / "source")
    file = tmp_path / "source/config.json"
    write(file, json.loads(file.read_text()) | change)
    with pytest.raises(ConfigError, match=says):
        run_import("published", tmp_path / "source", tmp_path / "runs")
