# SPDX-License-Identifier: Apache-2.0
"""Parts: row ranges of an index, each committed by the conditional create of one object.

    rows/attempt-0001/part-000123.parquet       the part 123
    rows/attempt-0001/part-000123.r1.parquet    the same, made again because the first is damaged

The object is its own commit record: its footer holds the identity of the artifact, the hash of the
index, the hash of its ids, its figures, its writer and the software. There are no notes, renames or
deletes, so a kill at any moment leaves a part committed or absent.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sg4v_ray.core.config import load
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.map_ahead import map_ahead
from sg4v_ray.core.row_files import READ_THREADS, RowFile, RowIndex, hash_ids, read_tables
from sg4v_ray.core.storage import Storage

MAX_PARTS: Final = 50_000
"""One listing and one footer for each part: 50 pages of a listing, and a minute of footers."""
_METADATA: Final = b"sg4v.part"
_NAME: Final = re.compile(r"part-(\d{6,})(?:\.r(\d+))?\.parquet")
_FOOTER_BYTES: Final = 16_384
"""First read of a footer. A larger footer costs a second read."""
_FOOTERS_AHEAD: Final = 256
"""Footers that wait for their turn. All 50,000 at once would take 160 MB."""
_MAGIC: Final = b"PAR1"
_LEAST_BYTES: Final = 12
"""Magic number at both ends and the length of the footer."""


@dataclass(frozen=True, slots=True)
class Part:
    """A row range inside one file of an index."""

    number: int
    file: int
    """Position of the file in the index."""
    first: int
    """First row inside the file."""
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFigures:
    """Counts of one part. They are stored in its footer, so a summary is never out of date."""

    rows: int
    tokens: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    """Rejected rows by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFooter:
    """The metadata of a committed part."""

    part: int
    writer: str
    """Unique id of the write that made the object."""
    identity: str
    """Fingerprint of the artifact and the attempt."""
    index_sha256: str
    ids_sha256: str
    figures: PartFigures
    software: dict[str, str]
    size_bytes: int = 0
    """Of the object; not stored in it."""


@dataclass(frozen=True, slots=True)
class PartProblem:
    """A part that cannot be used."""

    part: Part
    path: str
    reason: str


def split_into_parts(index: RowIndex, rows_per_part: int) -> list[Part]:
    """Cut each file of an index into parts of `rows_per_part` rows; the last has fewer."""
    parts: list[Part] = []
    for number, file in enumerate(index.files):
        for first in range(0, file.rows, rows_per_part):
            rows = min(rows_per_part, file.rows - first)
            parts.append(Part(len(parts), number, first, rows))
    return parts


def part_size(index: RowIndex, wanted: int) -> int:
    """Return the rows of a part: `wanted`, or more where that would give over `MAX_PARTS`.

    Parts stay inside a file of the index, so there can be one more part for each file.
    """
    return max(wanted, math.ceil(index.rows / MAX_PARTS))


def part_name(number: int, revision: int = 0) -> str:
    """Return the object name of a part; revision 0 is the first object of the part."""
    return f"part-{number:06d}" + (f".r{revision}" if revision else "") + ".parquet"


def revisions_listed(names: Iterable[str]) -> dict[int, list[int]]:
    """Return the revisions of each part that a listing names, in order."""
    found: dict[int, list[int]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            found.setdefault(int(match[1]), []).append(int(match[2] or 0))
    return {part: sorted(revisions) for part, revisions in found.items()}


def figures_of(table: pa.Table) -> PartFigures:
    """Count rows, generated tokens and rejects of a table."""
    names = table.column_names
    rejects = Counter(one for one in table["reject"].to_pylist() if one is not None)
    tokens = pc.sum(table["num_tokens"]).as_py() or 0 if "num_tokens" in names else 0
    return PartFigures(rows=len(table), tokens=tokens, rejects=dict(sorted(rejects.items())))


def encode_part(table: pa.Table, footer: PartFooter) -> bytes:
    """Return the Parquet object of a part, with checksums of its pages."""
    stored = asdict(footer)
    del stored["size_bytes"]
    metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(stored).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, write_page_checksum=True)
    return bytes(sink.getvalue())


def read_footer(folder: Storage, name: str, size_bytes: int | None = None) -> PartFooter:
    """Read the footer of a part. Costs one request for a small footer.

    Args:
        size_bytes: size of the object from a listing; without it, one more request.

    Raises:
        StorageError: there is no such object.
        ValueError: the object is damaged, or was not written as a part.
    """
    size = folder.size_bytes(name) if size_bytes is None else size_bytes
    if size < _LEAST_BYTES:
        raise ValueError(f"no Parquet footer fits into its {size} bytes")
    # Not a suffix range: Azure has none.
    tail = folder.get_range(name, max(0, size - _FOOTER_BYTES), size)
    if tail[-4:] != _MAGIC:
        raise ValueError("no Parquet footer at its end")
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if needed > min(size, 2**24):
        raise ValueError(f"its footer claims {needed} bytes of {size}")
    if needed > len(tail):
        tail = folder.get_range(name, size - needed, size)
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"its footer cannot be read: {error}") from error
    data_end = _data_end(metadata)
    if data_end > size - needed:
        raise ValueError(f"it has {size} bytes, its footer describes {data_end + needed}")
    stored = (metadata.metadata or {}).get(_METADATA)
    if stored is None:
        raise ValueError("it was not written as a part")
    footer = _footer(stored, size)
    if footer.figures.rows != metadata.num_rows:
        raise ValueError(
            f"it has {metadata.num_rows} rows, its footer counts {footer.figures.rows}"
        )
    return footer


def _footer(stored: bytes, size: int) -> PartFooter:
    try:
        footer = load(PartFooter, json.loads(stored), path="its part metadata")
    except ConfigError as error:
        raise ValueError(str(error)) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its part metadata is not JSON: {error}") from error
    return replace(footer, size_bytes=size)


def _data_end(metadata: pq.FileMetaData) -> int:
    """Return the position after the last column chunk."""
    ends = [0]
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            ends.append(start + chunk.total_compressed_size)
    return max(ends)


def expected_ids(index: RowIndex, parts: list[Part]) -> Iterator[tuple[Part, str]]:
    """Yield the hash of the ids of each part, one index file after the other.

    Memory holds the ids of some index files, never of the whole index.
    """
    by_file: dict[int, list[Part]] = {}
    for part in parts:
        by_file.setdefault(part.file, []).append(part)
    numbers = sorted(by_file)
    tables = read_tables(index.folder, [index.files[one] for one in numbers], ["id"])
    for number, table in zip(numbers, tables, strict=True):
        ids = table["id"].combine_chunks()
        for part in by_file[number]:
            yield part, hash_ids(ids.slice(part.first, part.rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedParts:
    """The result of a check of all parts of an attempt."""

    files: tuple[RowFile, ...]
    """The valid object of each part, in the order of the index; paths relative to the attempt."""
    figures: tuple[PartFigures, ...]
    software: tuple[dict[str, str], ...]
    """Distinct software versions of the valid objects."""
    problems: tuple[PartProblem, ...]
    """Damaged or foreign objects of parts without a valid object."""
    missing: tuple[Part, ...]
    """Parts without any valid object, those of `problems` included."""

    @property
    def rejects(self) -> Counter[str]:
        """Rejected rows of all valid parts by reason."""
        total: Counter[str] = Counter()
        for one in self.figures:
            total.update(one.rejects)
        return total


def check_parts(
    folder: Storage, index: RowIndex, parts: list[Part], *, identity: str
) -> CheckedParts:
    """Read the footer of every part in parallel and compare it with the index.

    An object is valid if it is whole, has the ids of its range, and carries this identity and
    this index. Of several objects of a part the first valid one counts.
    """
    sizes = folder.sizes()
    listed = revisions_listed(sizes)
    index_sha256 = index.sha256

    def check(
        expected: tuple[Part, str],
    ) -> tuple[Part, PartFooter | None, str, list[PartProblem]]:
        part, ids = expected
        problems = []
        for revision in listed.get(part.number, ()):
            name = part_name(part.number, revision)
            try:
                footer = read_footer(folder, name, sizes[name])
            except ValueError as error:
                problems.append(PartProblem(part, name, str(error)))
                continue
            reason = _mismatch(footer, part, ids, identity, index_sha256)
            if reason is None:
                return part, footer, name, []
            problems.append(PartProblem(part, name, reason))
        return part, None, "", problems

    files, figures, problems, missing = [], [], [], []
    software: dict[str, dict[str, str]] = {}
    expected = expected_ids(index, parts)
    for part, footer, name, found in map_ahead(
        check, expected, threads=2 * READ_THREADS, ahead=_FOOTERS_AHEAD
    ):
        problems += found
        if footer is None:
            missing.append(part)
            continue
        figures.append(footer.figures)
        software.setdefault(json.dumps(footer.software, sort_keys=True), footer.software)
        files.append(
            RowFile(
                path=name,
                rows=footer.figures.rows,
                size_bytes=footer.size_bytes,
                ids_sha256=footer.ids_sha256,
            )
        )
    return CheckedParts(
        files=tuple(files),
        figures=tuple(figures),
        software=tuple(software[key] for key in sorted(software)),
        problems=tuple(problems),
        missing=tuple(missing),
    )


def _mismatch(
    footer: PartFooter, part: Part, ids: str, identity: str, index_sha256: str
) -> str | None:
    if footer.identity != identity:
        return f"it belongs to another artifact or attempt (identity {footer.identity})"
    if footer.index_sha256 != index_sha256:
        return "it was made from another index"
    if footer.part != part.number or footer.ids_sha256 != ids:
        return "it has other ids than its row range of the index"
    return None
