# SPDX-License-Identifier: Apache-2.0
"""Looking at a place leaves it as it was; only writing makes folders."""

from pathlib import Path

import pytest

from sg4v_ray.core.errors import StorageError
from sg4v_ray.core.storage import Storage


def test_looking_into_a_folder_that_is_not_there_does_not_make_it(tmp_path: Path) -> None:
    home = Storage(str(tmp_path / "typo"))
    assert not home.exists("manifest.json")
    assert list(home.list()) == list(home.list("rows")) == []
    with pytest.raises(StorageError, match="no such object"):
        home.get("manifest.json")
    home.delete("rows")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("root", ["local", "s3://sg4v-test/place"])
@pytest.mark.usefixtures("s3")
def test_an_object_and_a_prefix_are_deleted_and_nothing_beside_them(
    tmp_path: Path, root: str
) -> None:
    home = Storage(root if "://" in root else str(tmp_path / root))
    names = ["a/1", "a/2", "ab", "c"]
    for name in names:
        home.put(name, b"x")
    home.delete("c")
    assert sorted(home.list()) == ["a/1", "a/2", "ab"]
    home.delete("a")
    assert list(home.list()) == ["ab"]
    home.delete("a")
    home.delete_objects(["ab", "never"])
    assert list(home.list()) == []
