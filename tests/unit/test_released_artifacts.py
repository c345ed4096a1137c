# SPDX-License-Identifier: Apache-2.0
"""Artifacts that version 0.1.0 made open, complete or resume with the present code.

`tests/data/runs-0.1` was made by that version; see its README.
"""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ArtifactCorrupt
from sg4v_ray.core.records import CaptionRow, ImageRow, TeacherCaptionRow
from sg4v_ray.core.row_files import RowIndex, read_tables
from sg4v_ray.core.rows import read_rows, row_files, row_index
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.parts import Part, check_parts, split_into_parts
from sg4v_ray.exactly_once.upgrade import adopt_rows_of_0_1

RELEASED = Path(__file__).parents[1] / "data" / "runs-0.1" / "root"
IMAGES, KILLED = Ref(name="images"), Ref(name="captions-killed")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A copy of the released root."""
    shutil.copytree(RELEASED, tmp_path / "root")
    return Storage(str(tmp_path / "root"))


def adopt(artifact_dir: Storage, out: Storage, index: RowIndex, parts: list[Part]) -> bool:
    return adopt_rows_of_0_1(
        artifact_dir, out, list(out.list()), index, parts, record=CaptionRow, identity="x"
    )


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("images", ImageRow),
        ("captions", CaptionRow),
        ("captions-retried", CaptionRow),
        ("teacher-captions", TeacherCaptionRow),
    ],
)
def test_finished_rows_open_once_each(storage: Storage, name: str, record: type) -> None:
    rows = read_rows(storage, Ref(name=name), record)
    assert len({row.id for row in rows}) == len(rows) == 12


def test_a_late_file_in_a_released_artifact_is_an_error(storage: Storage) -> None:
    captions = Ref(name="captions")
    folder = storage.sub(f"{captions.path}/rows/attempt-0001")
    first = next(name for name in folder.list() if name.endswith(".parquet"))
    folder.put("late.parquet", folder.get(first))
    with pytest.raises(ArtifactCorrupt, match="has 14 rows, its manifest counts 12"):
        row_files(storage.sub(captions.path), find(storage, captions))


def test_finished_rows_of_a_killed_job_become_parts_once(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    artifact_dir, index = storage.sub(KILLED.path), row_index(storage, IMAGES)
    out, parts = artifact_dir.sub("rows/attempt-0001"), split_into_parts(index, 4)
    assert adopt(artifact_dir, out, index, parts)
    assert "4 of its 6 finished rows are kept" in caplog.text
    caplog.clear()
    assert not adopt(artifact_dir, out, index, parts)
    assert caplog.text == ""
    checked = check_parts(out, index, parts, identity="x")
    assert [one.number for one in checked.missing] == [1, 2]  # rows 4 and 5 of 4 to 7 are finished
    (kept,) = read_tables(out, checked.files, None)
    assert kept["id"].to_pylist() == [f"{n:02d}.png" for n in range(4)]
    assert all(kept["text"].to_pylist())


def test_half_written_and_unnoted_files_of_a_killed_job_are_not_data(storage: Storage) -> None:
    artifact_dir, index = storage.sub(KILLED.path), row_index(storage, IMAGES)
    out, parts = artifact_dir.sub("rows/attempt-0001"), split_into_parts(index, 2)
    notes = list(artifact_dir.list("checkpoint-0001"))
    pending = notes[0].removesuffix(".parquet") + ".pending.parquet"
    artifact_dir.put(pending, artifact_dir.get(notes[0]))
    artifact_dir.delete(notes[0])
    out.put("cut.parquet", b"PAR1 cut off")
    adopt(artifact_dir, out, index, parts)
    checked = check_parts(out, index, parts, identity="x")
    assert len(checked.files) == 2
    assert Counter(one.rows for one in checked.files) == {2: 2}
