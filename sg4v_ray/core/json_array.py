# SPDX-License-Identifier: Apache-2.0
"""Read one JSON array of objects, however large, an object at a time and with its byte offset.

The standard library's scanner parses each object out of a window that moves over the file. What
the window holds is bounded by the longest object that is allowed, not by the file.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NoReturn

from sg4v_ray.core.errors import ContractError

MAX_OBJECT_BYTES: Final = 32 * 2**20
"""Longer objects are an error: without a limit, a bracket that is never closed fills the memory."""
_CHUNK_BYTES: Final = 2**20
_GZIP: Final = b"\x1f\x8b"
_BLANK: Final = re.compile(r"[ \t\n\r]*")
_MAX_DIGITS: Final = 4000  # Python itself refuses 4301
_LITERAL: Final = 16
"""A parse error so close to the end of the window may be a literal or an escape that is cut."""


@dataclass(frozen=True, slots=True)
class Element:
    """One object of the array."""

    index: int
    """Its number in the array, from 0."""
    offset: int
    """The byte of the file at which it begins."""
    value: dict[str, Any]

    def __str__(self) -> str:
        return _name(self.index, self.offset)


def read_objects(
    file: BinaryIO,
    *,
    where: str,
    max_bytes: int = MAX_OBJECT_BYTES,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Iterator[Element]:
    """Yield the objects of an array; none of an empty one.

    Args:
        where: what the file is called in errors.
        max_bytes: limit for one object.

    Raises:
        ContractError: the file is no JSON array of objects, is cut off, goes on after its array,
            or is no UTF-8. The text names the record and the byte.
    """
    window = _Window(file, where, chunk_bytes)
    window.begin()
    index = 0
    goes_on = window.peek() != "]"
    while goes_on:
        yield window.take(index, max_bytes)
        index += 1
        if (mark := window.peek()) not in (",", "]"):
            window.refuse(f"after record {index - 1}, ',' or ']' is missing")
        goes_on = mark == ","
        if goes_on:
            window.skip(1)
    window.skip(1)
    window.end()


class _Window:
    """A piece of the file as text, a place in it, and the byte of that place."""

    def __init__(self, file: BinaryIO, where: str, chunk_bytes: int) -> None:
        self._file, self._where, self._chunk_bytes = file, where, chunk_bytes
        self._decoder = json.JSONDecoder(
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        self._text, self._at, self._offset = "", 0, 0
        self._rest = b""  # the first bytes of a character whose others are not read yet
        self._is_over = False
        self._broken: int | None = None
        """The byte that is no UTF-8; for the window the file ends there."""

    def begin(self) -> None:
        """Move into the array."""
        self._fill(4)
        if self._text.startswith("\ufeff"):
            self.skip(1)
        if (first := self.peek()) != "[":
            lines = " (JSON lines are not read; write them as one array)" if first == "{" else ""
            self.refuse(f"it is no JSON array with records{lines}")
        self.skip(1)

    def peek(self) -> str:
        """Move to the next character that is not blank and return it; '' at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None
            self._move(blank.end())
            if self._at < len(self._text) or not self._fill(1):
                return self._text[self._at : self._at + 1]

    def skip(self, characters: int) -> None:
        """Move on by characters that are in the window."""
        self._move(self._at + characters)

    def take(self, index: int, max_bytes: int) -> Element:
        """Return the object that begins here and move behind it."""
        if self.peek() != "{":
            self.refuse(f"record {index} is no object")
        offset = self._offset
        name = _name(index, offset)
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                self._check_may_go_on(name, error)
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                problem = "it is nested too deeply" if deep else str(error)
                raise ContractError(f"{self._where}: {name}: {problem}") from error
            held = len(self._text) - self._at
            self._check_length(name, held, max_bytes)
            self._fill(held)  # twice as much: a long object is not parsed once a chunk
        self._move(end)
        self._check_length(name, self._offset - offset, max_bytes)
        return Element(index, offset, value)

    def end(self) -> None:
        """Check that nothing follows the array."""
        if self.peek() or self._broken is not None:
            self.refuse("something follows the array; write one array a file")

    def refuse(self, problem: str, cause: Exception | None = None) -> NoReturn:
        """Raise a problem together with what stands at this place."""
        found = self._text[self._at : self._at + 1]
        if found:
            problem += f"; at byte {self._offset:,} stands {found!r}"
        elif self._broken is not None:
            problem += f"; byte {self._broken:,} is no UTF-8, write the file as UTF-8"
        elif self._offset + len(self._rest) == 0:
            problem += "; the file is empty"
        else:
            problem += f"; the file ends at byte {self._offset + len(self._rest):,}, get it anew"
        raise ContractError(f"{self._where}: {problem}") from cause

    def _check_may_go_on(self, name: str, error: json.JSONDecodeError) -> None:
        """Refuse an object that cannot become right by what follows in the file."""
        margin = 0 if self._is_over else _LITERAL
        is_cut = error.pos >= len(self._text) - margin or _is_open_text(self._text, error.pos)
        if is_cut and not self._is_over:
            return
        self._move(len(self._text) if is_cut else error.pos)
        self.refuse(f"{name} is no JSON ({error.msg})", error)

    def _check_length(self, name: str, length: int, max_bytes: int) -> None:
        if length > max_bytes:
            raise ContractError(
                f"{self._where}: {name} is longer than {max_bytes:,} bytes; look for a quote or a "
                "bracket that is never closed there"
            )

    def _move(self, to: int) -> None:
        self._offset += len(self._text[self._at : to].encode())
        self._at = to

    def _fill(self, num_bytes: int) -> bool:
        """Read on and forget what lies before this place; say whether the file went on."""
        if self._is_over:
            return False
        chunk = self._file.read(max(num_bytes, self._chunk_bytes))
        if not self._text and self._offset == 0 and chunk.startswith(_GZIP):
            raise ContractError(f"{self._where} is compressed by gzip; unpack it first (gunzip)")
        self._is_over = not chunk
        data = self._rest + chunk
        try:
            more, used = codecs.utf_8_decode(data, "strict", self._is_over)
        except UnicodeDecodeError as error:
            more, used = data[: error.start].decode(), len(data)
            held = self._text[self._at :].encode()
            self._broken, self._is_over = self._offset + len(held) + error.start, True
        self._rest = data[used:]
        self._text, self._at = self._text[self._at :] + more, 0
        return True


def _name(index: int, offset: int) -> str:
    return f"record {index} at byte {offset:,}"


def _is_open_text(text: str, place: int) -> bool:
    """Say whether a text begins at a place and is not closed."""
    if text[place : place + 1] != '"':
        return False
    try:
        json.JSONDecoder().raw_decode(text, place)
    except json.JSONDecodeError:
        return True
    return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; of two equal keys, other readers keep another one than ours."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!r} twice; keep one")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write null")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number
