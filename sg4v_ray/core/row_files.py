# SPDX-License-Identifier: Apache-2.0
"""The files that hold an artifact's rows: immutable Parquet objects that a manifest lists.

Readers use this list and never a folder, so a file that a manifest does not list is not data.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sg4v_ray.core.errors import ArtifactCorrupt, StorageError
from sg4v_ray.core.map_ahead import map_ahead
from sg4v_ray.core.storage import Storage

ROWS_PER_INDEX_FILE: Final = 100_000
READ_THREADS: Final = 8
"""Files that are read at once. Each waits for a store most of its time."""
INDEX: Final = "index.json"
"""The list of an index that belongs to an artifact, such as the sampled images of a collection."""
_ADVICE: Final = (
    "Restore it from a copy; `python -m jobs.verify` lists all damage of an artifact, and the way "
    "without a copy"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFile:
    """One Parquet file of an artifact."""

    path: str
    """Relative to the artifact's folder."""
    rows: int
    size_bytes: int
    ids_sha256: str
    """`hash_ids` of the `id` column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowIndex:
    """A list of immutable row files: the input of a job that processes every row once."""

    folder: Storage
    """The folder that the paths of the files are relative to."""
    files: tuple[RowFile, ...]

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(one.rows for one in self.files)

    @property
    def sha256(self) -> str:
        """Hash of the ids and their order: equal exactly for indexes with the same rows."""
        text = json.dumps([[one.rows, one.ids_sha256] for one in self.files])
        return hashlib.sha256(text.encode()).hexdigest()


def hash_ids(ids: pa.Array | pa.ChunkedArray) -> str:
    """Return the sha256 of ids in their order.

    The hashed bytes are the lengths of all ids in bytes of UTF-8 (little-endian unsigned 32-bit
    integers) and then all ids, without separators.
    """
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    lengths, texts = hashlib.sha256(), []
    for chunk in chunks:
        array = chunk.cast(pa.large_binary())
        _, offsets, data = array.buffers()
        bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        lengths.update(np.diff(bounds).astype("<u4").tobytes())
        if len(array):
            texts.append(memoryview(data)[bounds[0] : bounds[-1]] if data is not None else b"")
    for text in texts:
        lengths.update(text)
    return lengths.hexdigest()


def encode(table: pa.Table) -> bytes:
    """Return a table as a Parquet file with a checksum for each page."""
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def put_table(folder: Storage, path: str, table: pa.Table) -> RowFile:
    """Write a table with an `id` column as the Parquet file `path`."""
    data = encode(table)
    folder.put(path, data, sync=True)
    return RowFile(
        path=path, rows=len(table), size_bytes=len(data), ids_sha256=hash_ids(table["id"])
    )


def read_table(folder: Storage, path: str, columns: Sequence[str] | None) -> pa.Table:
    """Read some (None: all) columns of one Parquet file.

    Raises:
        ArtifactCorrupt: the object is missing, or is not a whole Parquet file.
    """
    try:
        data = folder.get(path)
    except StorageError as error:
        raise ArtifactCorrupt(f"{folder.uri(path)} is missing. {_ADVICE}") from error
    try:
        # Not pq.read_table: that plans a scan of a data set, a millisecond for each small file.
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactCorrupt(
            f"{folder.uri(path)} is not a whole Parquet file: {error}. {_ADVICE}"
        ) from error


def read_tables(
    folder: Storage, files: Iterable[RowFile], columns: Sequence[str] | None
) -> Iterator[pa.Table]:
    """Yield the tables of files in their order; some files ahead are read in parallel.

    Raises:
        ArtifactCorrupt: a file is damaged or has another number of rows than its list entry.
    """

    def read(file: RowFile) -> pa.Table:
        table = read_table(folder, file.path, columns)
        if len(table) != file.rows:
            raise ArtifactCorrupt(
                f"{folder.uri(file.path)} has {len(table)} rows, its manifest lists {file.rows}. "
                f"{_ADVICE}"
            )
        return table

    return map_ahead(read, files, threads=READ_THREADS, ahead=READ_THREADS)


def write_index(folder: Storage, tables: Iterable[pa.Table]) -> RowIndex:
    """Write tables as an index of its own below `folder`; the list of its files is written last.

    An index that was written before is read and not written again, so `folder` must be named by
    whatever decides its rows.
    """
    if (index := open_index(folder)) is not None:
        return index
    files = [
        put_table(folder, f"part-{number:05d}.parquet", table)
        for number, table in enumerate(regrouped(tables, ROWS_PER_INDEX_FILE))
    ]
    listed = (json.dumps([asdict(one) for one in files], indent=1) + "\n").encode()
    folder.put(INDEX, listed, sync=True)
    return RowIndex(folder=folder, files=tuple(files))


def open_index(folder: Storage) -> RowIndex | None:
    """Return an index that `write_index` finished, or None."""
    if not folder.exists(INDEX):
        return None
    files: list[dict[str, Any]] = json.loads(folder.get(INDEX))
    return RowIndex(folder=folder, files=tuple(RowFile(**one) for one in files))


def regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the rows of tables in their order as tables of `rows` rows; the last has fewer."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += len(table)
        while count >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows)
            held, count = [whole.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held)
