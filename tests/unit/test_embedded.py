# SPDX-License-Identifier: Apache-2.0
"""The captioner of this package is copied below a root once, and never mistaken for another."""

import json
from pathlib import Path

import pytest

from sg4v_ray.core.artifact import MANIFEST, find
from sg4v_ray.core.errors import ArtifactDrift
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes import embedded

MAX_BYTES = 8 * 2**20


def test_it_is_an_artifact_like_any_other_and_small(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    ref = embedded.install_captioner(storage)
    manifest = find(storage, ref)
    folder = storage.localise(f"{ref.path}/model", cache=tmp_path, digests=manifest.digests)
    assert sum(one.stat().st_size for one in folder.iterdir()) <= MAX_BYTES
    assert embedded.install_captioner(storage) == ref


def test_another_captioner_at_its_place_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    ref = embedded.install_captioner(storage)
    path = f"{ref.path}/{MANIFEST}"
    older = json.loads(storage.get(path))
    older["digests"]["model.safetensors"] = "0" * 64
    storage.put(path, json.dumps(older).encode())
    with pytest.raises(ArtifactDrift, match="make clean-demo"):
        embedded.install_captioner(storage)
