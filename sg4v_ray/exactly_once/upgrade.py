# SPDX-License-Identifier: Apache-2.0
"""Rows of an attempt that version 0.1 started and did not finish, turned into parts.

Version 0.1 wrote row files with random names, and the ids of each finished file as a note in
`checkpoint-0001/`. A part needs all of its rows, so finished rows of incomplete parts are made
again; answers of a paid teacher are in its ledger and cost nothing more.
"""

import logging
import uuid
from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from sg4v_ray.core.errors import ArtifactCorrupt
from sg4v_ray.core.records import schema
from sg4v_ray.core.row_files import RowIndex, hash_ids, read_table, read_tables
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.parts import (
    Part,
    PartFooter,
    encode_part,
    figures_of,
    part_name,
    revisions_listed,
)

_log = logging.getLogger(__name__)

_NOTES: Final = "checkpoint-0001"
_PENDING: Final = ".pending.parquet"


def adopt_rows_of_0_1(
    artifact_dir: Storage,
    out: Storage,
    names: list[str],
    index: RowIndex,
    parts: list[Part],
    *,
    record: type,
    identity: str,
) -> bool:
    """Commit each part whose rows version 0.1 has finished.

    Args:
        names: the listing of `out`.

    Returns:
        True if version 0.1 has finished rows of it that may be in new parts now.
    """
    listed = revisions_listed(names)
    if all(part.number in listed for part in parts):
        return False
    finished = _finished_ids(artifact_dir)
    if not len(finished):
        return False
    files = [one for one in names if one.endswith(".parquet") and not revisions_listed([one])]
    places = dict(_places(out, files, finished))
    by_file: dict[int, list[Part]] = {}
    for part in parts:
        if part.number not in listed:
            by_file.setdefault(part.file, []).append(part)
    adopted = before = sum(part.rows for part in parts if part.number in listed)
    for number in sorted(by_file):
        (ids,) = read_tables(index.folder, [index.files[number]], ["id"])
        holders = {places[one] for one in ids["id"].to_pylist() if one in places}
        rows = [_rows_of(out, name, record, finished) for name in sorted(holders)]
        if rows:
            adopted += _commit_whole(
                out, by_file[number], ids["id"], pa.concat_tables(rows), identity, index
            )
    if adopted > before:
        _log.warning(
            "%s was started by version 0.1: %d of its %d finished rows are kept; the others belong "
            "to incomplete parts and are made again",
            artifact_dir.root, adopted - before, len(finished),
        )  # fmt: skip
    return adopted > before


def _finished_ids(artifact_dir: Storage) -> pa.Array:
    notes = [
        path
        for path in artifact_dir.list(_NOTES)
        if path.endswith(".parquet") and not path.endswith(_PENDING)
    ]
    tables = [read_table(artifact_dir, path, ["id"])["id"].cast(pa.string()) for path in notes]
    return pc.unique(pa.chunked_array(tables, pa.string()))


def _places(out: Storage, files: list[str], finished: pa.Array) -> Iterator[tuple[str, str]]:
    """Yield the id and the file of each finished row."""
    for name in files:
        try:
            ids = read_table(out, name, ["id"])["id"]
        except ArtifactCorrupt:  # a write that a kill cut off; it has no note
            continue
        for one in ids.filter(pc.is_in(ids, value_set=finished)).to_pylist():
            yield one, name


def _rows_of(out: Storage, name: str, record: type, finished: pa.Array) -> pa.Table:
    table = read_table(out, name, schema(record).names).cast(schema(record))
    return table.filter(pc.is_in(table["id"], value_set=finished))


def _commit_whole(
    out: Storage,
    parts: list[Part],
    ids: pa.ChunkedArray,
    rows: pa.Table,
    identity: str,
    index: RowIndex,
) -> int:
    """Commit the parts that have all rows; return the number of their rows."""
    adopted = 0
    for part in parts:
        wanted = ids.slice(part.first, part.rows)
        positions = pc.index_in(wanted, value_set=rows["id"].combine_chunks())
        if positions.null_count:
            continue
        table = rows.take(positions).combine_chunks()
        footer = PartFooter(
            part=part.number,
            writer=uuid.uuid4().hex,
            identity=identity,
            index_sha256=index.sha256,
            ids_sha256=hash_ids(wanted),
            figures=figures_of(table),
            software={"sg4v-ray": "0.1"},
        )
        out.create(part_name(part.number), encode_part(table, footer))
        adopted += part.rows
    return adopted
