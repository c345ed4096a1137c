# SPDX-License-Identifier: Apache-2.0
"""Rows of finished artifacts, read from the files that their manifests list."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sg4v_ray.core.artifact import Manifest, Ref, find
from sg4v_ray.core.errors import ArtifactCorrupt
from sg4v_ray.core.records import from_table, schema, to_table
from sg4v_ray.core.row_files import RowFile, RowIndex, hash_ids, put_table, read_table, read_tables
from sg4v_ray.core.storage import Storage

ROWS = "rows"
"""The folder of an artifact that holds its rows, or its attempts at them."""


def put_rows(folder: Storage, path: str, record: type, rows: Iterable[Any]) -> RowFile:
    """Write records of one class as the Parquet file `path`."""
    return put_table(folder, path, to_table(record, rows))


def row_files(artifact_dir: Storage, manifest: Manifest) -> tuple[RowFile, ...]:
    """Return the row files of an artifact, attempt by attempt.

    Raises:
        ArtifactCorrupt: the manifest has format 1, which lists no files, and its row folder has
            another number of rows than it counts.
    """
    if manifest.format > 1:
        return manifest.files
    files = tuple(
        _listed(artifact_dir, path)
        for attempt in manifest.attempts
        for path in artifact_dir.list(attempt)
        if path.endswith(".parquet")
    )
    found, expected = sum(one.rows for one in files), manifest.counts.get("rows")
    if len(manifest.attempts) == 1 and expected is not None and found != expected:
        raise ArtifactCorrupt(
            f"{artifact_dir.uri(manifest.attempts[0])} has {found} rows, its manifest counts "
            f"{expected}. A file was added or removed after the commit: move added files away, "
            "restore removed ones"
        )
    return files


def _listed(artifact_dir: Storage, path: str) -> RowFile:
    ids = read_table(artifact_dir, path, ["id"])["id"]
    size = artifact_dir.size_bytes(path)
    return RowFile(path=path, rows=len(ids), size_bytes=size, ids_sha256=hash_ids(ids))


def row_index(storage: Storage, ref: Ref, manifest: Manifest | None = None) -> RowIndex:
    """Return the rows of a finished index as the input of a job.

    Args:
        manifest: of `ref`, if it was read before.

    Raises:
        ArtifactMissing: it is not finished.
    """
    artifact_dir = storage.sub(ref.path)
    files = row_files(artifact_dir, manifest or find(storage, ref))
    return RowIndex(folder=artifact_dir, files=files)


def rows_by_file(
    artifact_dir: Storage, manifest: Manifest, columns: Sequence[str] | None
) -> Iterator[pa.Table]:
    """Yield some (None: all) columns file by file, each row from its newest attempt.

    Attempts after the first are small: their ids are held in memory, no row of the first is.
    """
    wanted = None if columns is None else list(dict.fromkeys(["id", *columns]))
    files = row_files(artifact_dir, manifest)
    replaced = pa.array([], pa.string())
    for attempt in reversed(manifest.attempts):
        here = [one for one in files if one.path.startswith(f"{attempt}/")]
        ids = [replaced]
        for table in read_tables(artifact_dir, here, wanted):
            if attempt != manifest.attempts[0]:
                ids.append(table["id"].combine_chunks())
            if len(replaced):
                table = table.filter(pc.invert(pc.is_in(table["id"], value_set=replaced)))
            yield table
        replaced = pa.concat_arrays([one.cast(pa.string()) for one in ids])


def all_rows(artifact_dir: Storage, manifest: Manifest, columns: Sequence[str] | None) -> pa.Table:
    """Return some (None: all) columns of all rows, each row from its newest attempt."""
    tables = list(rows_by_file(artifact_dir, manifest, columns))
    return pa.concat_tables(tables, promote_options="permissive")


def read_rows(storage: Storage, ref: Ref, record: type) -> list[Any]:
    """Read all rows of a finished artifact, sorted by id; each id from its newest attempt.

    Raises:
        ArtifactMissing: it is not finished.
        ContractError: its columns are not those of `record`.
    """
    artifact_dir = storage.sub(ref.path)
    rows: list[Any] = []
    for table in rows_by_file(artifact_dir, find(storage, ref), schema(record).names):
        rows += from_table(record, table, where=artifact_dir.root)
    return sorted(rows, key=lambda row: row.id)
