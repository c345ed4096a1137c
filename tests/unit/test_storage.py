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
