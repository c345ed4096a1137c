# SPDX-License-Identifier: Apache-2.0
"""Rows of artifacts as Parquet: written in pieces, read as one row an id."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
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


def read_columns(folder: Storage, columns: list[str]) -> pa.Table:
    """Read some columns of all Parquet files of a folder; an empty folder gives no rows."""
    filesystem, path = folder.arrow()
    files = [f"{path}/{name}" for name in folder.list() if name.endswith(".parquet")]
    tables = [pq.read_table(file, columns=columns, filesystem=filesystem) for file in files]
    if not tables:
        return pa.table({name: pa.array([], pa.string()) for name in columns})
    return pa.concat_tables(tables, promote_options="permissive")


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
