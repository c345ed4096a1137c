# SPDX-License-Identifier: Apache-2.0
"""Images inside tables: Parquet files, and data sets that Hugging Face `datasets` saved to disk.

A column may hold the bytes, the struct {bytes, path} of `datasets`, or URIs. Bytes stay where
they are: a row says in which row group and row its image lies.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.image_bytes import open_file
from sg4v_ray.core.location import Cell
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage, is_local, local_path
from sg4v_ray.sources import listing

MAX_GROUP_BYTES = 2**30
"""A worker holds a whole row group of the image column, so larger ones are refused."""


@identity_keys(
    "ParquetImages",
    files="files",
    image_column="image_column",
    id_column="id_column",
    prefixes="prefixes",
    name="name",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetImages:
    """Every row of some Parquet files."""

    files: str
    """Absolute path or URI, may hold `*`, `?`, `[..]`, `**` or `{0000..0050}`."""
    image_column: str = "image"
    """Bytes, a struct with a field `bytes`, or URIs."""
    id_column: str | None = None
    """Unique ids; without one an id is `file/row`."""
    prefixes: tuple[str, ...] = ()
    """Local folders and bucket prefixes that a column of URIs may name besides http(s) URLs."""
    name: str = "parquet"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(self.files)

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image.

        Raises:
            ConfigError: no file matches, or a column is not there.
            ContractError: a row group is too large, a file is no Parquet, or a URI is not allowed.
        """
        for found in listing.matching(self.files):
            with open_file(found.uri) as file:
                yield from self._of_file(found, _open_parquet(file, found.uri))

    def _of_file(self, found: listing.Found, file: pq.ParquetFile) -> Iterator[ImageRow]:
        column = image_leaf(file.schema_arrow, self.image_column, found.uri)
        if self.id_column is not None:
            _field(file.schema_arrow, self.id_column, found.uri)
        is_uri = not _is_bytes(_type_of(file.schema_arrow, column))
        # The pixels are not read: an index is metadata.
        wanted = [one for one in (column if is_uri else None, self.id_column) if one is not None]
        start = 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            _check_group(about, column, found.uri)
            table = file.read_row_group(group, columns=wanted)
            stem = found.name.removesuffix(".parquet")
            ids = _ids(table, self.id_column, stem, start, about.num_rows)
            if is_uri:
                yield from self._named(table, column, ids, found.uri)
            else:
                yield from _rows(Cell("parquet", found.uri, group, 0, column), self.name, ids)
            start += about.num_rows

    def _named(
        self, table: pa.Table, column: str, ids: list[str], where: str
    ) -> Iterator[ImageRow]:
        for key, uri in zip(ids, table[column].to_pylist(), strict=True):
            if uri is not None:
                listing.check_named(uri, self.prefixes, f"row {key!r} of {where}")
            # None becomes a row that is rejected: a reason, and no hole in the counts.
            yield ImageRow(id=key, source=self.name, uri=uri or "", size_bytes=0)


@identity_keys(
    "HfDataset", path="path", image_column="image_column", id_column="id_column", name="name"
)
@dataclass(frozen=True, kw_only=True, slots=True)
class HfDataset:
    """A data set that `datasets.save_to_disk` wrote: Arrow streams and a `state.json`."""

    path: str
    """Absolute path or URI of the folder that holds `state.json`; one split, not a dict of them."""
    image_column: str = "image"
    """A column with the feature Image, or of bytes."""
    id_column: str | None = None
    """Unique ids; without one an id is `file/row`."""
    name: str = "hf"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(f"{self.path.rstrip('/')}/")

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image.

        Raises:
            ConfigError: the folder is not such a data set, or a column is not there.
            ContractError: the data set was filtered or shuffled without `flatten_indices`.
        """
        folder = Storage(self.path.rstrip("/"))
        for name in _arrow_files(folder):
            with _arrow_file(folder.uri(name)) as file:
                yield from self._of_file(folder.uri(name), name.removesuffix(".arrow"), file)

    def _of_file(self, uri: str, stem: str, file: pa.NativeFile) -> Iterator[ImageRow]:
        schema = pa.ipc.read_schema(file)
        column = image_leaf(schema, self.image_column, uri)
        if not _is_bytes(_type_of(schema, column)):
            raise ConfigError(f"{uri}: column {column!r} has no bytes; index its URLs as Parquet")
        if self.id_column is not None:
            _field(schema, self.id_column, uri)
        start = 0
        for offset, message in _messages(file):
            if message.type != "record batch":
                raise ContractError(
                    f"{uri} has a {message.type} message; dictionaries are not read"
                )
            table = pa.Table.from_batches([pa.ipc.read_record_batch(message, schema)])
            ids = _ids(table, self.id_column, stem, start, table.num_rows)
            yield from _rows(Cell("arrow", uri, offset, 0, column), self.name, ids)
            start += table.num_rows


def image_leaf(schema: pa.Schema, name: str, where: str) -> str:
    """Return the path of the column that holds the bytes or URIs.

    Raises:
        ConfigError: there is no such column, or it holds neither.
    """
    kind = _field(schema, name, where).type
    if pa.types.is_struct(kind):
        field = kind.field("bytes") if kind.get_field_index("bytes") >= 0 else None
        kind, name = (field.type, f"{name}.bytes") if field is not None else (kind, name)
    if _is_bytes(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return name
    raise ConfigError(f"{where}: column {name!r} is {kind}, images are bytes, {{bytes}} or URIs")


def _field(schema: pa.Schema, name: str, where: str) -> pa.Field:
    if schema.get_field_index(name) < 0:
        raise ConfigError(f"{where} has no column {name!r}; it has {', '.join(schema.names)}")
    return schema.field(name)


def _type_of(schema: pa.Schema, leaf: str) -> pa.DataType:
    if leaf in schema.names:
        return schema.field(leaf).type
    outer, _, inner = leaf.partition(".")
    kind = schema.field(outer).type
    return kind.field(inner).type if inner else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open_parquet(file: BinaryIO, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ContractError(f"{uri} is no Parquet file: {error}") from error


def _check_group(group: pq.RowGroupMetaData, column: str, uri: str) -> None:
    columns = [group.column(n) for n in range(group.num_columns)]
    size = sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
    if size > MAX_GROUP_BYTES:
        raise ContractError(
            f"{uri} has a row group with {size} bytes in {column!r}, the limit is "
            f"{MAX_GROUP_BYTES}; write the file with smaller row groups (row_group_size=1000)"
        )


def _arrow_files(folder: Storage) -> list[str]:
    if not folder.exists("state.json"):
        splits = (
            " It has splits: name one of its folders." if folder.exists("dataset_dict.json") else ""
        )
        raise ConfigError(
            f"{folder.root} has no state.json, so save_to_disk did not write it.{splits}"
        )
    state = json.loads(folder.get("state.json"))
    if state.get("_indices_data_files"):
        raise ContractError(
            f"{folder.root} was filtered or shuffled and keeps its order in another file; call "
            "flatten_indices() before save_to_disk()"
        )
    return [str(one["filename"]) for one in state["_data_files"]]


def _messages(file: pa.NativeFile) -> Iterator[tuple[int, pa.Message]]:
    """Yield the rest of an Arrow stream, each message with the byte where it begins."""
    while True:
        offset = file.tell()
        try:
            message = pa.ipc.read_message(file)
        except EOFError:  # the stream's own end mark, or the end of the file
            return
        yield offset, message


def _arrow_file(uri: str) -> pa.NativeFile:
    """Open an Arrow stream; a local one is mapped, so that its pixels are not read."""
    if is_local(uri):
        return pa.memory_map(str(local_path(uri)))
    return pa.PythonFile(open_file(uri))


def _ids(table: pa.Table, column: str | None, stem: str, start: int, count: int) -> list[str]:
    if column is None:
        return [f"{stem}/{start + row}" for row in range(count)]
    return [str(one) for one in table[column].to_pylist()]


def _rows(group: Cell, source: str, ids: list[str]) -> Iterator[ImageRow]:
    """Yield the rows of one row group; `group` is the location of its first."""
    for row, key in enumerate(ids):
        yield ImageRow(id=key, source=source, uri=str(replace(group, row=row)), size_bytes=0)
