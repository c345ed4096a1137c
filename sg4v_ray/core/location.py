# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of one image lie, as one string that fits into a row's `uri`.

    /data/a.jpg  s3://bucket/a.jpg  https://host/a.jpg    a whole file
    tar:1536:20417:s3://bucket/shard-000.tar              20,417 bytes from byte 1,536 on
    parquet:3:17:image:/data/part-0.parquet               row 17 of row group 3, column `image`
    arrow:3:17:image:/data/data-00000.arrow               the same of an Arrow stream's batches

An index of archives stays metadata: no image is copied, and one is read without its neighbours'
names being trusted or anything being unpacked.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from urllib.parse import quote, unquote

from sg4v_ray.core.errors import ContractError

_CONTAINERS: Final = ("tar:", "parquet:", "arrow:")
_PLACE: Final = re.compile(r"(?:/|file:///|(?:https?|s3|gs|az|abfss?)://[^/])[^\0-\x1f\x7f]*")


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole file or object."""

    uri: str

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes of a file, such as a member of an uncompressed tar."""

    uri: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"tar:{self.offset}:{self.length}:{self.uri}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A binary value of a table: one row of one row group (Parquet) or record batch (Arrow)."""

    kind: Literal["parquet", "arrow"]
    uri: str
    group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.group}:{self.row}:{quote(self.column, safe='')}:{self.uri}"


Location: TypeAlias = Whole | Span | Cell


def parse(text: str) -> Location:
    """Read what `str()` of a location wrote.

    Raises:
        ContractError: it is no absolute path or URI of a kind that is read, nor a piece of one.
    """
    place = _split(text)
    if not _PLACE.fullmatch(place.uri):
        raise ContractError(
            f"{text!r} is no location of an image; write an absolute path or an http(s)://, "
            "s3://, gs:// or az:// URI. A file whose name has control characters must be renamed"
        )
    return place


def is_container(text: str) -> bool:
    """Say whether a string names a piece of a container and no whole file.

    Only `index_images` writes such strings; in a list of URLs, which a stranger wrote, they would
    read any bytes of any file.
    """
    return text.startswith(_CONTAINERS)


def _split(text: str) -> Location:
    if not is_container(text):
        return Whole(text)
    kind, _, rest = text.partition(":")
    try:
        if kind == "tar":
            offset, length, uri = rest.split(":", 2)
            return Span(uri, _count(offset), _count(length))
        group, row, column, uri = rest.split(":", 3)
        name = unquote(column)
        return Cell(
            "arrow" if kind == "arrow" else "parquet", uri, _count(group), _count(row), name
        )
    except ValueError:
        raise ContractError(
            f"{text!r} is no location of an image; an index made by index_images has good ones"
        ) from None


def _count(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(digits)
    return int(digits)
