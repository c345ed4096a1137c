# SPDX-License-Identifier: Apache-2.0
"""Offline verification of a finished artifact: its manifest, its files and their index.

Every listed file is read whole, with its page checksums. Memory holds 8 bytes for each row and
the ids of retry attempts; the ids of the first attempt are never in memory together.
"""

import base64
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Never

import numpy as np
import numpy.typing as npt
import obstore
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.exceptions import NotFoundError
from tqdm import tqdm

from sg4v_ray.core.artifact import CONFIG, Manifest, Ref, find, fingerprint_of
from sg4v_ray.core.errors import ArtifactCorrupt, ConfigError, StorageError
from sg4v_ray.core.map_ahead import map_ahead
from sg4v_ray.core.row_files import (
    READ_THREADS,
    RowFile,
    RowIndex,
    hash_ids,
    open_index,
    read_table,
    read_tables,
)
from sg4v_ray.core.rows import row_files
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage

MODEL_FOLDER: Final = "model"
"""Folder of a model artifact that its digests are relative to; those of others have none."""
INDEX_FOLDER: Final = re.compile(r"(?:chosen|index)-[0-9a-f]{16}")
"""Folders of an artifact with an index of its own: a sample, or the rows of several inputs."""
_MANIFEST: Final = re.compile(r"manifest(-\d{4})?\.json")
_FIRST_ATTEMPT: Final = "rows/attempt-0001"
"""Row folder of artifacts that have one row for each row of an index."""
_PLAN: Final = "plan.json"
_ARROW_SCHEMA: Final = b"ARROW:schema"
_PART: Final = b"sg4v.part"
"""Footer metadata of `exactly_once.parts`."""
_BLOCK_ROWS: Final = 100_000
"""Rows that are counted and looked up together: parts are small, lookups have a fixed cost."""
_LISTED_PROBLEMS: Final = 10
_HASHES_AT_ONCE: Final = 1000
_COLUMNS: Final[dict[str, Callable[[pa.DataType], bool]]] = {
    "id": lambda kind: kind in (pa.string(), pa.large_string()),
    "reject": lambda kind: kind in (pa.string(), pa.large_string(), pa.null()),
    "num_tokens": pa.types.is_integer,
}
"""Columns that are kept of each file once it is read, with the check of their types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """The result of a verification without problems."""

    artifact: str
    """`name@version`."""
    manifest: str
    """Name of the valid manifest."""
    fingerprint: str
    """Of identity, inputs and attempts. Only as recorded in format 1, which has no identity, and
    after a retry with raised limits."""
    format: int
    rows: int
    """Rows of the artifact. The id of each occurs exactly once."""
    ids_checked: int
    """Ids of all attempts."""
    attempts: int
    files: int
    """Row files."""
    digests: int
    """Other files, checked by sha256."""
    size_bytes: int
    """Of both kinds of files."""
    ids_sha256: str | None
    """`RowIndex.sha256` of all row files; None without any."""
    hashes: str
    """The hashes that were compared."""
    index: str
    """The index whose ids were compared in order, or why none was."""
    counts: dict[str, int]
    """Counts of the manifest that were compared with the rows."""
    inputs: dict[str, str]
    """Fingerprints of the input artifacts."""
    seconds: float


@dataclass(frozen=True, slots=True)
class _Problem:
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class _FileCheck:
    """A row file after it was read: its table, problems, or both."""

    file: RowFile
    table: pa.Table | None
    """The columns of `_COLUMNS` that it has; None if the file cannot be used."""
    problem: _Problem | None = None


@dataclass(slots=True)
class _Counted:
    """Rows of the artifact, each from its newest attempt."""

    rows: int = 0
    tokens: int | None = None
    rejects: Counter[str] | None = None
    """By reason. None, as `tokens`, if there is no such column."""

    def add(self, table: pa.Table) -> None:
        self.rows += len(table)
        if "reject" in table.column_names:
            found = pc.value_counts(table["reject"].drop_null()).to_pylist()
            self.rejects = self.rejects or Counter()
            self.rejects.update({one["values"]: one["counts"] for one in found})
        if "num_tokens" in table.column_names:
            self.tokens = (self.tokens or 0) + (pc.sum(table["num_tokens"]).as_py() or 0)

    def compare(self, counts: dict[str, int]) -> tuple[dict[str, int], list[_Problem]]:
        """Return the counts of a manifest that rows have too, and those that differ."""
        found = {"rows": self.rows} if "rows" in counts else {}
        if self.tokens is not None and "tokens" in counts:
            found["tokens"] = self.tokens
        if self.rejects is not None and "rejected" in counts:
            found["rejected"] = self.rejects.total()
            found |= {one: 0 for one in counts if one.startswith("rejected_")}
            found |= {f"rejected_{one}": count for one, count in self.rejects.items()}
        problems = [
            _Problem(
                f"count {name}",
                f"The manifest counts {counts.get(name, 0)} for {name!r}, the files have {count}.",
            )
            for name, count in found.items()
            if counts.get(name, 0) != count
        ]
        return {name: found[name] for name in found if name in counts}, problems


def verify(storage: Storage, ref: Ref, *, progress: bool = False) -> Receipt:
    """Check a finished artifact and return a receipt; nothing is written.

    Args:
        progress: show a progress bar on stderr.

    Raises:
        ArtifactMissing: it is not finished.
        ArtifactCorrupt: files, ids, hashes or counts disagree; the text has a sentence for each
            problem.
        StorageError: a file exists and cannot be read.
    """
    started_s = time.monotonic()
    with reading(storage.root):
        name = newest_manifest(storage, ref)
        manifest = find(storage, ref)
        return _verify(storage, ref, manifest, name, started_s, progress=progress)


def _verify(
    storage: Storage, ref: Ref, manifest: Manifest, name: str, started_s: float, *, progress: bool
) -> Receipt:
    artifact_dir = storage.sub(ref.path)
    problems: list[_Problem] = []
    _check_fingerprint(manifest, name, problems)
    digests_bytes = _check_digests(artifact_dir, manifest, problems, progress=progress)
    files = _row_files(artifact_dir, manifest, problems)
    index = _find_index(storage, artifact_dir, manifest, files, problems)
    with _bar("rows", sum(one.rows for one in files), unit="row", show=progress) as bar:
        rows = _RowCheck(artifact_dir, manifest, files, problems, bar)
        rows.run(index)
    counts, differing = rows.counted.compare(manifest.counts)
    if not rows.unusable and (files or not manifest.digests):
        problems += differing
    if problems:
        raise ArtifactCorrupt(_failure(storage, ref, manifest, problems))
    return Receipt(
        artifact=str(ref),
        manifest=name,
        fingerprint=manifest.fingerprint,
        format=manifest.format,
        rows=rows.counted.rows,
        ids_checked=rows.ids_checked,
        attempts=len(manifest.attempts),
        files=len(files),
        digests=len(manifest.digests),
        size_bytes=sum(one.size_bytes for one in files) + digests_bytes,
        ids_sha256=RowIndex(folder=artifact_dir, files=files).sha256 if files else None,
        hashes=_compared_hashes(manifest, files),
        index=index.outcome(in_order=manifest.format > 1),
        counts=counts if files else {},
        inputs=manifest.inputs,
        seconds=round(time.monotonic() - started_s, 3),
    )


def _check_fingerprint(manifest: Manifest, name: str, problems: list[_Problem]) -> None:
    """Compare the recorded fingerprint with that of the recorded identity and inputs."""
    if not manifest.identity or manifest.raised_limits:
        # Format 1 has no identity, and the fingerprint of a retry has the raised limits.
        return
    found = fingerprint_of(manifest.identity, manifest.inputs, manifest.attempts)
    if found != manifest.fingerprint:
        text = (
            f"{name} has the fingerprint {manifest.fingerprint}, its identity and inputs have "
            f"{found}."
        )
        problems.append(_Problem("fingerprint", text))


def _compared_hashes(manifest: Manifest, files: Sequence[RowFile]) -> str:
    found = []
    if files:
        recorded = manifest.format > 1
        found.append("ids of each row file, pages" if recorded else "none recorded (format 1)")
    if manifest.digests:
        found.append("sha256 of each other file")
    return ", ".join(found) or "no files"


def manifest_names(storage: Storage, ref: Ref) -> list[str]:
    """Return the names of an artifact's manifests, oldest first."""
    names = [one.rpartition("/")[2] for one in storage.list_folder(ref.path)]
    return sorted((one for one in names if _MANIFEST.fullmatch(one)), key=lambda x: (len(x), x))


def newest_manifest(storage: Storage, ref: Ref) -> str:
    """Return the name of the valid manifest.

    Raises:
        ArtifactMissing: the artifact is not finished.
    """
    names = manifest_names(storage, ref)
    if not names:
        find(storage, ref)  # raises ArtifactMissing with advice
    return names[-1]


def subfolders(storage: Storage) -> list[str]:
    """Return the names of the folders right below a root, in order."""
    try:
        found = obstore.list_with_delimiter(storage.open())
    except (NotFoundError, FileNotFoundError):
        return []
    return sorted(str(one).rstrip("/") for one in found["common_prefixes"])


def digests_folder(digests: Iterable[str]) -> str:
    """Return the prefix of an artifact's digests: `model/`, or nothing.

    An artifact's own `config.json` is its pinned config, so a digest of that name belongs to a
    model.
    """
    return f"{MODEL_FOLDER}/" if CONFIG in digests else ""


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Name the place in errors of a disk or a bucket."""
    try:
        yield
    except STORAGE_ERRORS as error:
        raise StorageError(
            f"{uri} cannot be read or written: {_first_line(error)}. Check the path, the disk or "
            "the network, and the credentials; then run again"
        ) from error


def hash64(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each id. Equal ids have equal hashes; the reverse is likely only."""
    array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    array = array.cast(pa.large_binary())
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    starts, lengths = bounds[:-1] - bounds[0], np.diff(bounds)
    text = np.zeros(int(bounds[-1] - bounds[0]) + 8, np.uint8)
    if data is not None:
        text[:-8] = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    # The 8 bytes from each position on, as one little-endian integer.
    words = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
    hashes = _mix(lengths.astype(np.uint64))
    for first in range(0, int(lengths.max(initial=0)), 8):
        rows = np.flatnonzero(lengths > first)
        left = np.minimum(lengths[rows] - first, 8).astype(np.uint64)
        mask = np.uint64(2**64 - 1) >> (np.uint64(64) - np.uint64(8) * left)
        hashes[rows] = _mix(hashes[rows] ^ (words[starts[rows] + first] & mask))
    return hashes


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finalizer of splitmix64, a bijection."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _RowCheck:
    """One pass over all row files, newest attempt first."""

    def __init__(
        self,
        artifact_dir: Storage,
        manifest: Manifest,
        files: tuple[RowFile, ...],
        problems: list[_Problem],
        bar: "tqdm[Never]",
    ) -> None:
        self.counted = _Counted()
        self.ids_checked = self.unusable = 0
        self._dir, self._manifest, self._files = artifact_dir, manifest, files
        self._problems, self._bar = problems, bar

    def run(self, index: "_Index") -> None:
        """Check all attempts.

        Args:
            index: the rows that the first attempt was made from.
        """
        retried: dict[str, pa.Array] = {}
        for attempt in self._manifest.attempts[:0:-1]:
            retried[attempt] = self._retry(attempt, _joined(retried.values()))
        for attempt in self._manifest.attempts[:1]:
            self._first(attempt, retried, index)

    def _retry(self, attempt: str, replaced: pa.Array) -> pa.Array:
        """Check a retry attempt and return its ids.

        Args:
            replaced: ids of later attempts, whose rows count instead.
        """
        files, held = _of(attempt, self._files), []
        hashes = _Hashes(sum(one.rows for one in files))
        for block in self._blocks(files, None):
            held.append(block["id"])
            hashes.add(block["id"])
            self._count(block, replaced)
        self._report_duplicates(files, hashes)
        return _joined(held)

    def _first(self, attempt: str, retried: dict[str, pa.Array], index: "_Index") -> None:
        """Check the first attempt: its ids are those of the artifact and of its index."""
        files, found = _of(attempt, self._files), []
        replaced, rows = _joined(retried.values()), sum(one.rows for one in files)
        hashes, cursor = _Hashes(rows), None
        if index.rows is not None and self._manifest.format > 1:
            cursor = _IndexCursor(index.rows, index.name)
        for block in self._blocks(files, cursor):
            hashes.add(block["id"])
            found.append(self._count(block, replaced))
        self._report_duplicates(files, hashes)
        if cursor is not None:
            self._problems += cursor.end(rows)
        if self.unusable:
            return
        known = _joined(found)
        for name, ids in retried.items():
            unknown = ids.filter(pc.invert(pc.is_in(ids, value_set=known)))
            if len(unknown):
                text = (
                    f"{self._dir.uri(name)} has the id {unknown[0].as_py()!r}, which the first "
                    f"attempt does not have (such ids: {len(unknown)})."
                )
                self._problems.append(_Problem("retry", text))
        if index.rows is not None and cursor is None:
            self._problems += _compare_as_sets(index.rows, index.name, hashes)

    def _count(self, block: pa.Table, replaced: pa.Array) -> pa.Array:
        """Count the rows that no later attempt replaces; return the ids of the others."""
        if not len(replaced):
            self.counted.add(block)
            return replaced
        is_replaced = pc.is_in(block["id"], value_set=replaced)
        self.counted.add(block.filter(pc.invert(is_replaced)))
        return block["id"].filter(is_replaced)

    def _blocks(
        self, files: Sequence[RowFile], cursor: "_IndexCursor | None"
    ) -> Iterator[pa.Table]:
        """Yield the usable rows of files in order, about `_BLOCK_ROWS` at once."""
        held: list[pa.Table] = []
        for one in self._checked(files):
            self._bar.update(one.file.rows)
            if one.problem is not None:
                self._problems.append(one.problem)
                self.unusable += 1
            if cursor is not None:
                cursor.compare(one.file, one.table if one.problem is None else None)
            if one.table is None:
                continue
            self.ids_checked += len(one.table)
            held.append(one.table)
            if sum(map(len, held)) >= _BLOCK_ROWS:
                yield _concat(held)
                held = []
        if held:
            yield _concat(held)

    def _checked(self, files: Sequence[RowFile]) -> Iterator[_FileCheck]:
        """Read files in parallel and yield them in order."""
        folders = {one.path.rpartition("/")[0] for one in files}
        sizes = {
            path: size for one in sorted(folders) for path, size in self._dir.sizes(one).items()
        }

        def check(file: RowFile) -> _FileCheck:
            return _check_file(self._dir, file, sizes.get(file.path))

        return map_ahead(check, files, threads=READ_THREADS, ahead=2 * READ_THREADS)

    def _report_duplicates(self, files: Sequence[RowFile], hashes: "_Hashes") -> None:
        """Report ids that occur several times in an attempt.

        Equal hashes are only candidates: a second pass over the ids decides.
        """
        candidates = hashes.repeated()
        for first in range(0, len(candidates), _HASHES_AT_ONCE):
            places = self._places(files, candidates[first : first + _HASHES_AT_ONCE])
            found = [
                _Problem("duplicate", f"The id {key!r} occurs twice: in {a} and in {b}.")
                for key, (a, b) in places.items()
                if b
            ]
            self._problems += found[:_LISTED_PROBLEMS]
            if found:
                return

    def _places(
        self, files: Sequence[RowFile], wanted: npt.NDArray[np.uint64]
    ) -> dict[str, tuple[str, str]]:
        """Return the first two files of each id that has one of these hashes."""
        places: dict[str, tuple[str, str]] = {}
        for file in files:
            try:
                ids = read_table(self._dir, file.path, ["id"])["id"]
            except (ArtifactCorrupt, StorageError, pa.ArrowException):
                continue  # reported by the first pass
            path = self._dir.uri(file.path)
            for key in ids.filter(pa.array(np.isin(hash64(ids), wanted))).to_pylist():
                first = places.get(key)
                places[key] = (path, "") if first is None else (first[0], first[1] or path)
        return places


def _compare_as_sets(index: RowIndex, name: str, hashes: "_Hashes") -> list[_Problem]:
    """Compare the ids of an attempt with an index regardless of order: format 1 has none."""
    missing, example = 0, ""
    try:
        for table in read_tables(index.folder, index.files, ["id"]):
            absent = ~hashes.contain(hash64(table["id"]))
            if not missing and absent.any():
                example = f", e.g. {table['id'][int(absent.argmax())].as_py()!r}"
            missing += int(absent.sum())
    except (ArtifactCorrupt, StorageError) as error:
        return [_unreadable_index(name, error)]
    if not missing and hashes.count == index.rows:
        return []
    text = (
        f"The ids are not those of {name}: {hashes.count} rows instead of {index.rows}, "
        f"{missing} ids are missing{example}."
    )
    return [_Problem("index", text)]


def _unreadable_index(name: str, error: Exception) -> _Problem:
    return _Problem("index", f"The index {name} cannot be read: {_first_line(error)}.")


class _Hashes:
    """The hashes of all ids of an attempt."""

    def __init__(self, most: int) -> None:
        self.count = 0
        self._values = np.empty(most, np.uint64)
        self._is_sorted = False

    def add(self, ids: pa.ChunkedArray) -> None:
        found = hash64(ids)
        self._values[self.count : self.count + len(found)] = found
        self.count += len(found)

    def _sorted(self) -> npt.NDArray[np.uint64]:
        values = self._values[: self.count]
        if not self._is_sorted:
            values.sort()  # in place: memory holds one copy
            self._is_sorted = True
        return values

    def repeated(self) -> npt.NDArray[np.uint64]:
        """Return the hashes that several ids have."""
        values = self._sorted()
        return np.unique(values[1:][values[1:] == values[:-1]])

    def contain(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return for each hash whether an id of the attempt has it."""
        values = self._sorted()
        if not len(values):
            return np.zeros(len(hashes), np.bool_)
        places = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
        return np.asarray(values[places] == hashes)


@dataclass(frozen=True, slots=True)
class _Index:
    """The index that an artifact was made from."""

    rows: RowIndex | None
    """None if it is not compared."""
    name: str
    """Its name, or why it is not compared."""

    def outcome(self, *, in_order: bool) -> str:
        """Return the receipt's line about a comparison without problems."""
        if self.rows is None:
            return self.name
        order = "in the same order" if in_order else "order not compared (format 1)"
        return f"the {self.rows.rows:,} ids of {self.name}, {order}"


class _IndexCursor:
    """Compares the ids of files with an index, row by row, up to the first difference."""

    def __init__(self, index: RowIndex, name: str) -> None:
        self._index, self._name = index, name
        self._tables = read_tables(index.folder, index.files, ["id"])
        self._held = _joined([])
        self._row = 0
        self._problems: list[_Problem] = []

    def compare(self, file: RowFile, table: pa.Table | None) -> None:
        """Compare the ids of the next file with the index; a file without a table is skipped."""
        if self._problems:
            return
        try:
            expected = self._take(file.rows)
        except (ArtifactCorrupt, StorageError) as error:
            self._problems.append(_unreadable_index(self._name, error))
            return
        first, self._row = self._row, self._row + file.rows
        if table is None or (found := _joined([table["id"]])).equals(expected):
            return
        both = min(len(found), len(expected))
        equal = pc.equal(found.slice(0, both), expected.slice(0, both)).to_numpy(False)
        place = both if equal.all() else int(equal.argmin())
        there = repr(expected[place].as_py()) if place < len(expected) else "no row"
        text = (
            f"{file.path} has other ids than {self._name}: row {first + place} has the id "
            f"{found[place].as_py()!r}, the index has {there} there."
        )
        self._problems.append(_Problem("index", text))

    def end(self, rows: int) -> list[_Problem]:
        """Compare the number of rows and return all problems."""
        if rows == self._index.rows:
            return self._problems
        text = f"The first attempt has {rows} rows, {self._name} has {self._index.rows}."
        return [*self._problems, _Problem("index rows", text)]

    def _take(self, rows: int) -> pa.Array:
        """Return the next ids of the index; fewer at its end."""
        held, count = [self._held], len(self._held)
        while count < rows and (table := next(self._tables, None)) is not None:
            held.append(table["id"])
            count += len(table)
        ids = _joined(held)
        self._held = ids.slice(rows)
        return ids.slice(0, rows)


def _check_file(folder: Storage, file: RowFile, size: int | None) -> _FileCheck:
    """Read one file whole.

    Args:
        size: its size in bytes by the listing of its folder; None if it is not listed.
    """
    where = folder.uri(file.path)
    if size is None:
        return _FileCheck(file, None, _Problem("missing", f"{where} is missing."))
    if size != file.size_bytes:
        text = f"{where} has {size} bytes, the manifest lists {file.size_bytes}."
        return _FileCheck(file, None, _Problem("size", text))
    try:
        with reading(where):
            table, ids_in_footer = _read(folder.get(file.path))
        found = hash_ids(table["id"])
    except (_Damaged, pa.ArrowException, ValueError, MemoryError) as error:
        text = f"{where} is damaged: {_first_line(error)}."
        return _FileCheck(file, None, _Problem("damaged", text))
    if len(table) != file.rows:
        text = f"{where} has {len(table)} rows, the manifest lists {file.rows}."
        return _FileCheck(file, None, _Problem("rows", text))
    kept = table.select([one for one in _COLUMNS if one in table.column_names])
    kept = kept.set_column(0, "id", kept["id"].cast(pa.large_string()))
    if found != file.ids_sha256:
        text = f"{where} has other ids than the manifest lists: sha256 {found[:16]}..."
        return _FileCheck(file, kept, _Problem("ids", f"{text} instead of {file.ids_sha256[:16]}."))
    if ids_in_footer not in (None, found):
        text = f"{where} has another hash of its ids in its footer."
        return _FileCheck(file, kept, _Problem("footer", text))
    return _FileCheck(file, kept)


class _Damaged(Exception):
    """A file whose content cannot be used."""


def _read(data: bytes) -> tuple[pa.Table, str | None]:
    """Return the rows of a Parquet file, and the hash of its ids that its footer has, if any.

    Page checksums do not cover the footer. Arrow stores the schema there twice, so a damaged
    column name or type is found by comparing the two.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read(use_threads=False)
    except OSError as error:
        raise _Damaged(_first_line(error)) from error
    stored = file.metadata.metadata or {}
    if (encoded := stored.get(_ARROW_SCHEMA)) is not None:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(encoded)))
        if (schema.names, schema.types) != (table.schema.names, table.schema.types):
            raise _Damaged("its two schemas differ")
    if "id" not in table.column_names:
        raise _Damaged(f"it has no column 'id', but {', '.join(table.column_names)}")
    for name, is_right in _COLUMNS.items():
        if name in table.column_names and not is_right(table[name].type):
            raise _Damaged(f"its column {name!r} has the type {table[name].type}")
    if table["id"].null_count:
        raise _Damaged(f"it has {table['id'].null_count} rows without an id")
    part = stored.get(_PART)
    return table, None if part is None else json.loads(part).get("ids_sha256")


def _row_files(
    artifact_dir: Storage, manifest: Manifest, problems: list[_Problem]
) -> tuple[RowFile, ...]:
    """Return the listed files that belong to an attempt; readers skip others silently."""
    files = row_files(artifact_dir, manifest)
    listed = tuple(one for attempt in manifest.attempts for one in _of(attempt, files))
    for one in set(files) - set(listed):
        text = f"The manifest lists {one.path}, which belongs to none of its attempts."
        problems.append(_Problem("attempt", text))
    return listed


def _of(attempt: str, files: Iterable[RowFile]) -> list[RowFile]:
    return [one for one in files if one.path.startswith(f"{attempt}/")]


def _check_digests(
    artifact_dir: Storage, manifest: Manifest, problems: list[_Problem], *, progress: bool
) -> int:
    """Compare the sha256 of each file in `digests`; return their bytes."""
    if not manifest.digests:
        return 0
    prefix = digests_folder(manifest.digests)
    sizes = artifact_dir.sizes(prefix.rstrip("/"))
    wanted = {f"{prefix}{name}": sha256 for name, sha256 in manifest.digests.items()}
    total = sum(sizes.get(path, 0) for path in wanted)
    with _bar("files", total, unit="B", show=progress) as bar:
        for path, sha256 in wanted.items():
            if path not in sizes:
                text = f"{artifact_dir.uri(path)} is missing."
                problems.append(_Problem("missing file", text))
            elif (found := _sha256(artifact_dir, path, bar)) != sha256:
                text = f"{artifact_dir.uri(path)} was changed: sha256 {found[:16]}..."
                problems.append(_Problem("digest", f"{text} instead of {sha256[:16]}."))
    return total


def _sha256(folder: Storage, path: str, bar: "tqdm[Never]") -> str:
    digest = hashlib.sha256()
    with reading(folder.uri(path)):
        for chunk in obstore.get(folder.open(), path).stream():
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _find_index(
    storage: Storage,
    artifact_dir: Storage,
    manifest: Manifest,
    files: Sequence[RowFile],
    problems: list[_Problem],
) -> _Index:
    """Return the index that the rows were made from, or the reason why it is not compared."""
    if not files or manifest.attempts[0] != _FIRST_ATTEMPT:
        return _Index(None, "none, the rows are not made from one")
    own = [one for one in subfolders(artifact_dir) if INDEX_FOLDER.fullmatch(one)]
    if own:
        used = used_indexes(artifact_dir, own)
        if not used:
            return _Index(None, "sample, not compared")
        folder, index = used[0]
        return _Index(index, folder)
    indexes, reasons = [], []
    for name, fingerprint in manifest.inputs.items():
        try:
            found = _input_rows(storage, name, fingerprint)
        except ArtifactCorrupt as error:
            problems.append(_unreadable_index(name, error))
            continue
        if isinstance(found, str):
            reasons.append(found)
        elif found.files:
            indexes.append(_Index(found, name))
    if len(indexes) == 1:
        return indexes[0]
    reason = "sample" if indexes else "; ".join(reasons) or "no input has rows"
    return _Index(None, f"{reason}, not compared")


def _input_rows(storage: Storage, name: str, fingerprint: str) -> RowIndex | str:
    """Return the rows of an input artifact, or why there are none.

    Raises:
        ArtifactCorrupt: it has format 1 and another number of rows than its manifest counts.
    """
    ref = _ref(name)
    if ref is None or not manifest_names(storage, ref):
        return f"{name} is not below this root"
    manifest, folder = find(storage, ref), storage.sub(ref.path)
    if manifest.fingerprint != fingerprint:
        return f"{name} was made again from another config"
    return RowIndex(folder=folder, files=row_files(folder, manifest))


def used_indexes(artifact_dir: Storage, folders: Iterable[str]) -> list[tuple[str, RowIndex]]:
    """Return the indexes inside an artifact that have the ids of the first attempt.

    Several have them if they differ in other columns only, such as the prompt of each row.
    """
    path = f"{_FIRST_ATTEMPT}/{_PLAN}"
    if not artifact_dir.exists(path):
        return []
    sha256 = json.loads(artifact_dir.get(path)).get("index_sha256")
    indexes = ((folder, open_index(artifact_dir.sub(folder))) for folder in folders)
    return [(folder, one) for folder, one in indexes if one is not None and one.sha256 == sha256]


def _ref(text: str) -> Ref | None:
    """Return the address in `name@version`; None for inputs that are no artifacts."""
    name, at, version = text.partition("@")
    try:
        return Ref(name=name, version=version) if at else None
    except ConfigError:
        return None


def _failure(storage: Storage, ref: Ref, manifest: Manifest, problems: list[_Problem]) -> str:
    """Return the text of all problems: the first of each kind, then others."""
    first: dict[str, _Problem] = {}
    for one in problems:
        first.setdefault(one.kind, one)
    others = [one for one in problems if first[one.kind] is not one]
    listed = [*first.values(), *others][:_LISTED_PROBLEMS]
    lines = [one.text for one in listed]
    if more := len(problems) - len(listed):
        lines.append(f"There are {more} more problems.")
    advice = "make the artifact again as another version (--out.version v2)"
    if manifest.format > 1 and _FIRST_ATTEMPT in manifest.attempts:
        advice = (
            f"delete the damaged row files and each manifest*.json in {storage.uri(ref.path)}, "
            "then run its job and its retries again: only deleted parts are made again"
        )
    return "\n  ".join(
        [
            f"{ref} at {storage.uri(ref.path)} is not as its manifest lists it "
            f"({len(problems)} problem{'s' if len(problems) > 1 else ''}):",
            *lines,
            f"Restore the named files from a copy and verify again. Without a copy, {advice}. "
            "Artifacts made from it have the old rows.",
        ]
    )


def _bar(label: str, total: int, *, unit: str, show: bool) -> "tqdm[Never]":
    return tqdm(
        total=total,
        desc=f"verify {label}",
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not show or not total,
    )


def _joined(arrays: Iterable[Any]) -> pa.Array:
    """Return the ids of arrays and chunked arrays as one array."""
    chunks = [
        chunk
        for one in arrays
        for chunk in (one.chunks if isinstance(one, pa.ChunkedArray) else [one])
    ]
    return pa.concat_arrays([one.cast(pa.large_string()) for one in chunks or [pa.array([])]])


def _concat(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
