# SPDX-License-Identifier: Apache-2.0
"""A part is committed or absent, and a check finds every object that is not its part."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.row_files import RowIndex, hash_ids, regrouped, write_index
from sg4v_ray.core.rows import put_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.parts import (
    MAX_PARTS,
    Part,
    PartFooter,
    check_parts,
    encode_part,
    figures_of,
    part_name,
    part_size,
    read_footer,
    revisions_listed,
    split_into_parts,
)

ROWS_PER_PART = 4


@pytest.fixture
def index(tmp_path: Path) -> RowIndex:
    """Two files of 10 and 5 rows."""
    folder = Storage(str(tmp_path / "index"))
    rows = [ImageRow(id=f"i{n}", source="s", uri="/x", size_bytes=1) for n in range(15)]
    files = (
        put_rows(folder, "a.parquet", ImageRow, rows[:10]),
        put_rows(folder, "b.parquet", ImageRow, rows[10:]),
    )
    return RowIndex(folder=folder, files=files)


@pytest.fixture
def out(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def part_bytes(
    index: RowIndex, part: Part, *, ids: list[str] | None = None, identity: str = "me"
) -> bytes:
    start = part.first + (10 if part.file else 0)
    ids = [f"i{n}" for n in range(start, start + part.rows)] if ids is None else ids
    size = len(ids)
    table = pa.table(
        {
            "id": ids,
            "text": ["a picture " * 50] * size,
            "num_tokens": [3] * size,
            "reject": pa.array(["missing", *[None] * (size - 1)], pa.string()),
        }
    )
    footer = PartFooter(
        part=part.number,
        writer="w",
        identity=identity,
        index_sha256=index.sha256,
        ids_sha256=hash_ids(table["id"]),
        figures=figures_of(table),
        software={"python": "3"},
    )
    return encode_part(table, footer)


def write_all(out: Storage, index: RowIndex) -> list[Part]:
    parts = split_into_parts(index, ROWS_PER_PART)
    for part in parts:
        assert out.create(part_name(part.number), part_bytes(index, part))
    return parts


def test_parts_cover_every_row_once_and_stay_inside_a_file(index: RowIndex) -> None:
    parts = split_into_parts(index, ROWS_PER_PART)
    assert [(one.file, one.first, one.rows) for one in parts] == [
        (0, 0, 4), (0, 4, 4), (0, 8, 2), (1, 0, 4), (1, 4, 1),
    ]  # fmt: skip
    assert [one.number for one in parts] == list(range(5))


def test_an_index_of_many_rows_has_no_more_parts_than_one_listing_takes(index: RowIndex) -> None:
    large = RowIndex(folder=index.folder, files=index.files * 20_000_000)
    assert large.rows / part_size(large, 512) <= MAX_PARTS
    assert part_size(index, 512) == 512


def test_valid_parts_are_listed_with_their_figures(index: RowIndex, out: Storage) -> None:
    parts = write_all(out, index)
    checked = check_parts(out, index, parts, identity="me")
    assert (checked.missing, checked.problems) == ((), ())
    assert [one.rows for one in checked.files] == [4, 4, 2, 4, 1]
    assert checked.rejects == {"missing": 5}
    assert sum(one.tokens for one in checked.figures) == 45
    assert checked.software == ({"python": "3"},)
    assert [one.size_bytes for one in checked.files] == list(out.sizes().values())


def test_a_part_that_nobody_wrote_is_missing(index: RowIndex, out: Storage) -> None:
    parts = write_all(out, index)
    out.delete(part_name(3))
    checked = check_parts(out, index, parts, identity="me")
    assert [one.number for one in checked.missing] == [3]
    assert checked.problems == ()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda data, _: data[:-100], "no Parquet footer", id="cut"),
        pytest.param(lambda data, _: data[:4] + data[200:], "its footer describes", id="hole"),
        pytest.param(lambda data, _: b"", "no Parquet footer", id="empty"),
        pytest.param(lambda data, _: b"\0" * len(data), "no Parquet footer", id="zeros"),
        pytest.param(
            lambda data, _: data[:-8] + b"\xff\xff\xff\x7fPAR1", "its footer claims", id="length"
        ),
        pytest.param(
            lambda _, index: part_bytes(index, Part(2, 0, 8, 2), identity="other"),
            "another artifact or attempt",
            id="other prompt",
        ),
        pytest.param(
            lambda _, index: part_bytes(index, Part(2, 0, 8, 2), ids=["i8", "i7"]),
            "other ids than its row range",
            id="other ids",
        ),
        pytest.param(
            lambda _, index: part_bytes(index, Part(1, 0, 4, 4)),
            "other ids than its row range",
            id="other part",
        ),
        pytest.param(
            lambda _, index: part_bytes(
                RowIndex(folder=index.folder, files=index.files[:1]), Part(2, 0, 8, 2)
            ),
            "another index",
            id="other index",
        ),
    ],
)
def test_a_damaged_or_foreign_object_is_reported_and_its_next_name_counts(
    index: RowIndex, out: Storage, damage: Callable[[bytes, RowIndex], bytes], reason: str
) -> None:
    parts = write_all(out, index)
    good = out.get(part_name(2))
    out.put(part_name(2), damage(good, index))
    checked = check_parts(out, index, parts, identity="me")
    assert [one.number for one in checked.missing] == [2]
    (problem,) = checked.problems
    assert problem.path == "part-000002.parquet" and reason in problem.reason
    assert out.create(part_name(2, 1), good)
    checked = check_parts(out, index, parts, identity="me")
    assert (checked.missing, checked.problems) == ((), ())
    assert checked.files[2].path == "part-000002.r1.parquet"


def test_late_files_in_the_folder_are_not_data(index: RowIndex, out: Storage) -> None:
    parts = write_all(out, index)
    out.put("uuid_000001_000000-0.parquet", out.get(part_name(0)))
    out.put("part-000000.r9.parquet", out.get(part_name(0)))
    checked = check_parts(out, index, parts, identity="me")
    assert [one.path for one in checked.files] == [part_name(one.number) for one in parts]


@pytest.mark.parametrize("root", ["local", "s3://sg4v-test/short"])
@pytest.mark.parametrize("size", [0, 4, 11])
@pytest.mark.usefixtures("s3")
def test_an_object_too_short_for_a_footer_is_damaged(tmp_path: Path, root: str, size: int) -> None:
    out = Storage(root if "://" in root else str(tmp_path / root))
    out.put(part_name(0), b"PAR1PAR1PAR1"[:size])
    with pytest.raises(ValueError, match=f"no Parquet footer fits into its {size} bytes"):
        read_footer(out, part_name(0))


def test_a_parquet_file_without_part_metadata_is_no_part(index: RowIndex, out: Storage) -> None:
    out.put(part_name(0), index.folder.get("a.parquet"))
    with pytest.raises(ValueError, match="was not written as a part"):
        read_footer(out, part_name(0))


@pytest.mark.parametrize("metadata", ["[]", '"text"', "{}", "null", '{"part": 0', '{"part": "0"}'])
def test_part_metadata_of_another_form_is_damage(out: Storage, metadata: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ["a"]}, metadata={"sg4v.part": metadata}), sink)
    out.put(part_name(0), bytes(sink.getvalue()))
    with pytest.raises(ValueError, match="its part metadata"):
        read_footer(out, part_name(0))


def test_a_footer_larger_than_the_first_read_is_read_whole(index: RowIndex, out: Storage) -> None:
    table = pa.table({"id": ["a"], "reject": pa.nulls(1, pa.string())})
    footer = PartFooter(
        part=0, writer="w", identity="me", index_sha256="x", ids_sha256="y",
        figures=figures_of(table), software={f"package-{n}": "1.0" for n in range(2000)},
    )  # fmt: skip
    out.put(part_name(0), encode_part(table, footer))
    assert len(read_footer(out, part_name(0)).software) == 2000


def test_names_of_parts_are_read_back() -> None:
    names = ["part-000007.parquet", "part-000007.r2.parquet", "part-1234567.parquet", "plan.json"]
    assert revisions_listed(names) == {7: [0, 2], 1234567: [0]}


@pytest.mark.parametrize("other", [["a", "bc"], ["ab", "c", ""], ["abc"], ["c", "ab"]])
def test_the_hash_of_ids_depends_on_their_borders_and_order(other: list[str]) -> None:
    assert hash_ids(pa.array(["ab", "c"])) != hash_ids(pa.array(other))


def test_the_hash_of_ids_does_not_depend_on_chunks_or_types() -> None:
    ids = [f"ü{n}" for n in range(100)]
    whole = hash_ids(pa.array(ids))
    assert hash_ids(pa.chunked_array([ids[:30], [], ids[30:]], pa.large_string())) == whole
    assert hash_ids(pa.array(["x", *ids, "y"]).slice(1, 100)) == whole
    assert hash_ids(pa.array([], pa.string())) == hash_ids(pa.chunked_array([], pa.string()))


def test_an_index_is_written_once_and_read_after_that(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    table = pa.table({"id": ["a", "b", "c"]})
    first = write_index(folder, [table])
    assert write_index(folder, [pa.table({"id": ["other"]})]) == first
    assert first.rows == 3


def test_regrouped_rows_keep_their_order() -> None:
    tables = [pa.table({"id": list(range(n, n + 3))}) for n in range(0, 12, 3)]
    found = [one["id"].to_pylist() for one in regrouped(tables, 5)]
    assert found == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
