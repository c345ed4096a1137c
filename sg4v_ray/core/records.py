# SPDX-License-Identifier: Apache-2.0
"""The rows that stages hand to each other: the contract between them.

A record is a frozen dataclass; its Arrow schema follows from its field types, so a table written
by one stage is checked column by column when the next one reads it.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import pyarrow as pa

from sg4v_ray.core.errors import ContractError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """One image of `images@v`: metadata only, never bytes."""

    id: str
    """Unique and stable within the index."""
    source: str
    """Name of the source, e.g. `coco`."""
    uri: str
    """Absolute path or URI of the encoded image, or its place in an archive (`core.location`)."""
    size_bytes: int
    """0 where it is not known before fetching."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionRow:
    """One image of `captions@v`: a caption, or the reason why there is none."""

    id: str
    source: str
    uri: str
    text: str | None
    """None exactly when `reject` is set."""
    num_tokens: int
    """Generated tokens, the end token included."""
    finish_reason: str | None
    """`stop` or `length`; None when nothing was generated."""
    reject: str | None
    """A `Reject` value, or None for a good caption."""
    reject_detail: str | None
    """What a person needs to know about the reject, e.g. the decoder's message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedRow(ImageRow):
    """One image that a teacher is asked about."""

    prompt: str
    """Name of its prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCaptionRow(CaptionRow):
    """One image of `teacher-captions@v`: a caption row with what was asked and what it cost."""

    prompt: str
    """Name of the prompt that was answered last."""
    prompt_sha256: str
    """First 16 hex digits of the prompt's hash."""
    image_sha256: str | None
    """Of the image file's bytes; None where it could not be read."""
    prompt_tokens: int
    usd: float
    """What the answers cost, a refused first one included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRow:
    """One image of `caption-scores@v`: a captioned one, or one of an evaluation set."""

    id: str
    """The caption's id; of an evaluation image `name@version/id`."""
    is_caption: bool
    phash: str | None
    """Perceptual hash of the image, 16 hex digits; None exactly when `reject` is set."""
    clip_score: float | None
    """Mean CLIPScore of the caption's sentences, 0 to 2.5."""
    worst_clip_score: float | None
    """CLIPScore of the sentence that fits worst."""
    reject: str | None
    reject_detail: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One side of a conversation. The image placeholder is not part of the text."""

    role: str
    """`user` or `assistant`."""
    text: str

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise ContractError(f"role must be 'user' or 'assistant', got {self.role!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One training example of `dataset@v`."""

    id: str
    source: str
    uri: str | None
    """The image, or None for a text-only conversation."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of `questions@v` with every answer that counts as right."""

    id: str
    image_id: str
    uri: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One question of `predictions@v` with what the model said."""

    id: str
    image_id: str
    uri: str
    text: str
    answers: tuple[str, ...]
    prediction: str | None
    """None exactly when `reject` is set."""
    num_tokens: int
    finish_reason: str | None
    reject: str | None
    reject_detail: str | None


_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """Return the Arrow type of a field annotation and whether it may be null."""
    if annotation in _SCALARS:
        return _SCALARS[annotation], False
    if typing.get_origin(annotation) is Literal:
        return pa.string(), False
    if typing.get_origin(annotation) is types.UnionType:
        (inner,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
        return _arrow_type(inner)[0], True
    if typing.get_origin(annotation) is tuple:
        item, _ = _arrow_type(typing.get_args(annotation)[0])
        return pa.list_(pa.field("item", item, nullable=False)), False
    if dataclasses.is_dataclass(annotation):
        return pa.struct(list(schema(cast(type, annotation)))), False
    raise TypeError(f"no Arrow type for {annotation!r}")


@functools.cache
def schema(record: type) -> pa.Schema:
    """Return the Arrow schema of a record class."""
    hints = typing.get_type_hints(record)
    fields = []
    for field in dataclasses.fields(record):
        arrow_type, nullable = _arrow_type(hints[field.name])
        fields.append(pa.field(field.name, arrow_type, nullable=nullable))
    return pa.schema(fields)


def to_table(record: type, rows: Iterable[Any]) -> pa.Table:
    """Write records of one class as an Arrow table with exactly that class's schema."""
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=schema(record))


def check_columns(table_schema: pa.Schema, record: type, *, where: str) -> None:
    """Raise ContractError unless every column of `record` is there with its type.

    Extra columns are allowed: a newer writer may know more than an older reader.
    """
    for field in schema(record):
        index = table_schema.get_field_index(field.name)
        if index < 0:
            raise ContractError(
                f"{where} has no column {field.name!r}; {record.__name__} needs "
                f"{', '.join(schema(record).names)}"
            )
        found = table_schema.field(index).type
        if not _compatible(found, field.type):
            raise ContractError(
                f"{where}: column {field.name!r} is {found}, {record.__name__} needs {field.type}"
            )


def _compatible(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Compare types but not the nullability inside lists and structs, which Parquet widens."""
    if pa.types.is_list(wanted) or pa.types.is_large_list(wanted):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _compatible(found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted):
        return pa.types.is_struct(found) and all(
            found.get_field_index(f.name) >= 0 and _compatible(found.field(f.name).type, f.type)
            for f in wanted.fields
        )
    if pa.types.is_string(wanted):
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
    return bool(found == wanted)


def from_table(record: type, table: pa.Table, *, where: str) -> list[Any]:
    """Read records of one class from a table.

    Raises:
        ContractError: a column is missing or has another type.
    """
    check_columns(table.schema, record, where=where)
    names = schema(record).names
    return [_from_plain(record, row) for row in table.select(names).to_pylist()]


def _from_plain(record: type, row: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(record)
    return record(**{name: _value(hints[name], value) for name, value in row.items()})


def _value(annotation: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return tuple(_value(item, one) for one in value)
    if dataclasses.is_dataclass(annotation):
        return _from_plain(cast(type, annotation), value)
    return value
