# SPDX-License-Identifier: Apache-2.0
"""A bench empties only what a bench filled."""

from pathlib import Path

import pytest

from jobs._bench_run import empty
from sg4v_ray.core.errors import ConfigError


def test_a_bench_empties_its_own_folder(tmp_path: Path) -> None:
    root = tmp_path / "new" / "bench"
    empty(root)
    (root / "photos").mkdir()
    empty(root)
    assert not (root / "photos").exists()


def test_a_bench_touches_nothing_that_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="name a new folder"):
        empty(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "dear"
