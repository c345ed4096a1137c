# SPDX-License-Identifier: Apache-2.0
"""Rows of artifacts as Parquet: written in pieces, read as one row an id."""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.records import from_table, schema, to_table
from sg4v_ray.core.storage import Storage

ROWS = "rows"
"""The folder of an artifact that holds its rows, or its attempts at them."""


def put_rows(folder: Storage, name: str, record: type, rows: Iterable[Any]) -> None:
    """Write records of one class as the Parquet file `name`."""
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(record, rows), sink)
    folder.put(name, sink.getvalue().to_pybytes())


def read_columns(folder: Storage, columns: list[str] | None) -> pa.Table:
    """Read some (None: all) columns of the Parquet files of a folder; no file gives no rows."""
    filesystem, path = folder.arrow()
    files = [f"{path}/{name}" for name in folder.list() if name.endswith(".parquet")]
    tables = [pq.read_table(file, columns=columns, filesystem=filesystem) for file in files]
    if not tables:
        return pa.table({name: pa.array([], pa.string()) for name in columns or ()})
    return pa.concat_tables(tables, promote_options="permissive")


def newest(home: Storage, attempts: tuple[str, ...], columns: list[str]) -> pa.Table:
    """Read `id` and some columns of an artifact's rows, each row from its newest attempt."""
    return pa.concat_tables(newest_by_file(home, attempts, columns), promote_options="permissive")


def newest_by_file(
    home: Storage, attempts: tuple[str, ...], columns: list[str] | None
) -> Iterator[pa.Table]:
    """Yield `id` and some (None: all) columns a file at a time, each row from its newest attempt.

    Attempts after the first are small: of them the ids are kept, of the first nothing is.
    """
    later = pa.array([], pa.string())
    for attempt in reversed(attempts):
        filesystem, path = home.sub(attempt).arrow()
        here = []
        for name in home.sub(attempt).list():
            if name.endswith(".parquet"):
                wanted = None if columns is None else ["id", *columns]
                table = pq.read_table(f"{path}/{name}", columns=wanted, filesystem=filesystem)
                yield table.filter(pc.invert(pc.is_in(table["id"], value_set=later)))
                if attempt != attempts[0]:
                    here.append(table["id"].combine_chunks())
        later = pa.concat_arrays([later, *here])


def read_rows(storage: Storage, ref: Ref, record: type) -> list[Any]:
    """Read all rows of a finished artifact, sorted by id; of each id the newest attempt.

    Raises:
        ArtifactMissing: it is not finished.
        ContractError: its columns are not those of `record`.
    """
    latest: dict[str, Any] = {}
    for attempt in find(storage, ref).attempts:
        folder = storage.sub(f"{ref.path}/{attempt}")
        table = read_columns(folder, schema(record).names)
        latest.update((row.id, row) for row in from_table(record, table, where=folder.root))
    return [latest[key] for key in sorted(latest)]
