# SPDX-License-Identifier: Apache-2.0
"""Index images and questions: metadata as Parquet, one row each.

folders, packages -> images@v, questions@v

An index holds no pixels; an unreadable file becomes a row here and a reject later.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import ImageRow, Question
from sg4v_ray.core.row_files import ROWS_PER_INDEX_FILE, RowFile
from sg4v_ray.core.rows import ROWS, put_rows, read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.sources.catalogue import PaperImages
from sg4v_ray.sources.drawn_shapes import DrawnShapes
from sg4v_ray.sources.easy_vqa import EasyVqaImages, EasyVqaQuestions
from sg4v_ray.sources.folder import Folder, Glob
from sg4v_ray.sources.llava import LlavaImages
from sg4v_ray.sources.tables import HfDataset, ParquetImages
from sg4v_ray.sources.tars import Tars
from sg4v_ray.sources.urls import UrlList

_log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Something that can list its images."""

    name: str

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image; a source that makes its images writes them below `files`."""


Source: TypeAlias = (
    Folder
    | Glob
    | Tars
    | ParquetImages
    | HfDataset
    | LlavaImages
    | UrlList
    | PaperImages
    | EasyVqaImages
    | DrawnShapes
)


@identity_keys("IndexConfig", sources="sources", allow_incomplete="allow_incomplete")
@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Where the images of an index come from."""

    sources: tuple[Source, ...]
    allow_incomplete: bool = False
    """Accept sources that lack images which their catalogue entry or JSON names. They are counted
    in the manifest either way."""

    def __post_init__(self) -> None:
        names = [one.name for one in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"an index needs sources of different names, got {names}")


@identity_keys("QuestionsConfig", source="source")
@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionsConfig:
    """Where the questions of an evaluation or fine-tuning set come from."""

    source: EasyVqaQuestions


def run(config: IndexConfig, *, out: Ref, where: Where) -> Manifest:
    """Write the index `out`; open it if it is finished.

    Raises:
        ContractError: two images have one id; both URIs are named. Or a source is incomplete.
        ConfigError: a source is not there, or has no image.
    """

    completeness: dict[str, tuple[int, int]] = {}

    def read(home: Storage) -> Iterator[ImageRow]:
        for source in config.sources:
            rows = _not_empty(source.rows(home.sub(f"files/{source.name}")), source.name)
            yield from _counted(rows, source, completeness)
        _check_complete(completeness, allow_incomplete=config.allow_incomplete)

    metrics = {"completeness": completeness}
    return _write(ImageRow, read, config, inputs={}, out=out, where=where, metrics=metrics)


def _counted(
    rows: Iterable[Any], source: Source, completeness: dict[str, tuple[int, int]]
) -> Iterator[Any]:
    """Pass rows on; then note how many images are there and how many there should be."""
    named = there = 0
    for row in rows:
        named += 1
        there += row.size_bytes > 0 or not isinstance(source, LlavaImages)
        yield row
    expected = source.expected if isinstance(source, PaperImages) else named
    completeness[source.name] = (there, expected)


def _check_complete(completeness: dict[str, tuple[int, int]], *, allow_incomplete: bool) -> None:
    lines = [
        f"{name}: {there} of {expected} images are there ({there / expected:.1%})"
        for name, (there, expected) in completeness.items()
        if there < expected
    ]
    if lines and not allow_incomplete:
        raise ContractError(
            f"{'; '.join(lines)}. Get the rest, or index what is there with "
            "--step.0.config.allow-incomplete"
        )
    for line in lines:
        _log.warning("%s", line)


def run_questions(config: QuestionsConfig, *, images: Ref, out: Ref, where: Where) -> Manifest:
    """Write the questions `out` about the images of an index; open it if it is finished.

    Raises:
        ContractError: a question is about an image that the index does not have.
    """
    storage = where.storage
    index = find(storage, images)
    uris = {row.id: row.uri for row in read_rows(storage, images, ImageRow)}

    def read(home: Storage) -> Iterator[Question]:
        return _not_empty(config.source.rows(uris), config.source.name)

    inputs = {str(images): index.fingerprint}
    return _write(Question, read, config, inputs=inputs, out=out, where=where)


def _write(
    record: type,
    read: Any,
    config: object,
    *,
    inputs: dict[str, str],
    out: Ref,
    where: Where,
    metrics: dict[str, Any] | None = None,
) -> Manifest:
    storage = where.storage
    if is_finished(storage, out, config=config, inputs=inputs):
        return find(storage, out)
    home = storage.sub(out.path)
    with hold(home) as lease:
        if is_finished(storage, out, config=config, inputs=inputs):  # since the first check
            return find(storage, out)
        begin(storage, out, config, inputs=inputs, lease=lease)
        # A folder of this writer alone: an overtaken writer overwrites no file of its successor.
        folder = f"{ROWS}/{lease.token}"
        files: list[RowFile] = []
        seen: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for number, rows in enumerate(_pieces(_unique(read(home), seen))):
            files.append(put_rows(home, f"{folder}/part-{number:05d}.parquet", record, rows))
            for row in rows:
                counts[getattr(row, "source", "questions")] += 1
        _log.info("%s: %s", out, ", ".join(f"{count} {name}" for name, count in counts.items()))
        return commit(
            storage,
            out,
            config=config,
            inputs=inputs,
            counts={"rows": len(seen), **counts},
            attempts=(folder,),
            files=tuple(files),
            metrics=metrics,
            lease=lease,
        )


def _not_empty(rows: Iterable[Any], name: str) -> Iterator[Any]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ConfigError(f"the source {name!r} has no rows; check its path")


def _unique(rows: Iterable[Any], seen: dict[str, str]) -> Iterator[Any]:
    for row in rows:
        if row.id in seen:
            raise ContractError(
                f"two rows have the id {row.id!r}: {seen[row.id]} and {row.uri}. Rename or remove "
                "one, or index them in two indexes"
            )
        seen[row.id] = row.uri
        yield row


def _pieces(rows: Iterable[Any]) -> Iterator[list[Any]]:
    piece: list[Any] = []
    for row in rows:
        piece.append(row)
        if len(piece) == ROWS_PER_INDEX_FILE:
            yield piece
            piece = []
    if piece:
        yield piece
