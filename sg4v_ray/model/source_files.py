# SPDX-License-Identifier: Apache-2.0
"""Read what lies in a folder that others made: JSON, and tensors from safetensors or pickled files.

Tensors are mapped from their files and read when they are used, so a folder of 26 GB opens at
once. No code of a file is run: a pickled file may hold tensors and nothing else.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sg4v_ray.core.errors import ConfigError, WeightsError
from sg4v_ray.model.weights import listed

WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls a folder's weights, in the order in which they are looked for."""
_AGAIN: Final = "download it again"


def read_json(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is missing; it comes with the weights, {_AGAIN}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error}); {_AGAIN}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} holds no JSON object; {_AGAIN}")
    return fields


def has_weights(folder: Path) -> bool:
    """Say whether a folder has weights under one of transformers' names."""
    return any(_stored(folder, name) for name in WEIGHTS)


def read_folder(folder: Path, names: tuple[str, ...] = WEIGHTS) -> dict[str, Tensor]:
    """Return all tensors of a folder by name, on the CPU.

    Args:
        folder: with one file, or with shards and their index.
        names: the file's name without shard numbers; the first one found is read.

    Raises:
        WeightsError: no weights, or a file is missing, damaged, or not what the index lists.
    """
    for name in names:
        for file in _stored(folder, name):
            return _read_shards(file, name) if file.suffix == ".json" else read_file(file)
    raise WeightsError(
        f"{folder} has no weights: no {' and no '.join(names)}, whole or with an index; give the "
        "folder into which they were downloaded"
    )


def read_file(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name.

    Raises:
        WeightsError: it is missing or damaged, or a pickled file holds more than tensors.
    """
    if not file.is_file():
        raise WeightsError(f"{file} is missing; {_AGAIN}")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_pickled(file)


def _stored(folder: Path, name: str) -> list[Path]:
    """Return the file or the index of a folder's weights, or nothing."""
    index, whole = folder / f"{name}.index.json", folder / name
    shards = _shards(folder, name)
    if shards and not index.is_file():
        raise WeightsError(f"{folder} has {shards[0]} but no {index.name}; {_AGAIN}")
    found = [file for file in (index, whole) if file.is_file()]
    if len(found) > 1:
        raise WeightsError(
            f"{folder} has both {index.name} and {name}; delete the one that is not meant"
        )
    return found


def _shards(folder: Path, name: str) -> list[str]:
    stem, _, suffix = name.rpartition(".")
    return sorted(file.name for file in folder.glob(f"{stem}-*-of-*.{suffix}"))


def _read_shards(index: Path, name: str) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(one, str) for one in places.values()):
        raise WeightsError(f"{index} has no weight_map of names; {_AGAIN}")
    files = sorted(set(places.values()))
    # A name with a folder in it could point anywhere on this machine.
    if odd := sorted({*_shards(index.parent, name), *files} ^ set(files)) or [
        file for file in files if Path(file).name != file
    ]:
        raise WeightsError(
            f"{index.parent}: {odd[0]} is no file that {index.name} may list; delete it, or "
            "download the folder again"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        found = read_file(index.parent / file)
        _check_shard(index, file, found, {key for key, one in places.items() if one == file})
        state |= found
    return state


def _check_shard(index: Path, file: str, found: Mapping[str, Tensor], expected: set[str]) -> None:
    problems = [listed("missing", expected - set(found)), listed("extra", set(found) - expected)]
    if any(problems):
        raise WeightsError(
            f"{index.parent / file} does not hold what {index.name} lists: "
            f"{'; '.join(filter(None, problems))}. The two are not of one download: download both "
            "again"
        )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is cut off or no safetensors file ({error}); {_AGAIN}"
        ) from error


def _read_pickled(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        # torch's own text advises weights_only=False, which would run what the file says.
        raise WeightsError(
            f"{file} cannot be read ({type(error).__name__}): it is cut off, older than torch 1.6, "
            f"or holds more than tensors. Nothing in it was run. {_AGAIN.capitalize()}, or ask its "
            "authors for safetensors"
        ) from error
    named = state if isinstance(state, dict) else {type(state).__name__: state}
    odd = [str(key) for key, value in named.items() if not isinstance(value, Tensor)]
    if odd or named is not state:
        raise WeightsError(
            f"{file} is no state dict: {listed('it also has', odd or named)}. Save the state dict "
            "alone, as safetensors"
        )
    return dict(state)
