# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of one image lie, as one string that fits into a row's `uri`.

    /data/a.jpg  s3://bucket/a.jpg  https://host/a.jpg    a whole file
    tar:1536:20417:s3://bucket/shard-000.tar              20,417 bytes from byte 1,536 on
    parquet:3:17:image:/data/part-0.parquet               row 17 of row group 3, column `image`
    arrow:3:17:image:/data/data-00000.arrow               the same of an Arrow stream's batches

An index of archives stays metadata: no image is copied, and one is read without its neighbours'
names being trusted or anything being unpacked.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import quote, unquote

from sg4v_ray.core.errors import ContractError


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
        ContractError: it begins like a piece of a container and is not one.
    """
    kind, colon, rest = text.partition(":")
    try:
        if colon and kind == "tar":
            offset, length, uri = rest.split(":", 2)
            return Span(uri, int(offset), int(length))
        if colon and (kind == "parquet" or kind == "arrow"):
            group, row, column, uri = rest.split(":", 3)
            name = unquote(column)
            return Cell("arrow" if kind == "arrow" else "parquet", uri, int(group), int(row), name)
    except ValueError:
        raise ContractError(
            f"{text!r} is no location of an image; an index made by index_images has good ones"
        ) from None
    return Whole(text)
