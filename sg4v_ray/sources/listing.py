# SPDX-License-Identifier: Apache-2.0
"""List files below a folder or prefix, local or in a bucket, by a glob pattern."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import obstore

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import Storage, is_local, local_path

_MAGIC = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Found:
    """One file: its URI, its path below the folder that was listed, and its bytes."""

    uri: str
    name: str
    size_bytes: int


def check_place(uri: str) -> None:
    """Raise ConfigError if a place is relative or not one that can be listed."""
    if "://" not in uri and not uri.startswith("/"):
        raise ConfigError(f"{uri!r} is relative; write {Path(uri).absolute()} or a URI")
    Storage(_fixed_part(uri))


def below(folder: str) -> Iterator[Found]:
    """Yield every file below a folder, in an order that does not change.

    Raises:
        ConfigError: the folder is local and does not exist, or a file's name is not UTF-8.
    """
    if is_local(folder):
        yield from _below_local(local_path(folder))
        return
    root = Storage(folder)
    found = [one for batch in obstore.list(root.open()) for one in batch]
    for one in sorted(found, key=lambda one: one["path"]):
        yield Found(root.uri(one["path"]), one["path"], one["size"])


def matching(pattern: str) -> Iterator[Found]:
    """Yield the files that a path or URI with `*`, `?`, `[..]`, `**` or `{000..050}` names.

    Raises:
        ConfigError: nothing matches.
    """
    folder = _fixed_part(pattern)
    rest = pattern.removeprefix(folder).lstrip("/")
    wanted = [re.compile(_regex(one)) for one in _ranges(rest)]
    any_found = False
    for one in below(folder):
        if any(regex.fullmatch(one.name) for regex in wanted):
            any_found = True
            yield one
    if not any_found:
        raise ConfigError(f"no file matches {pattern}; check the path (** also matches folders)")


def _below_local(root: Path) -> Iterator[Found]:
    if not root.is_dir():
        raise ConfigError(
            f"the folder {root} does not exist on this machine; give the source's place with a "
            "flag such as --step.0.config.sources.0.path /absolute/path"
        )
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            _check_name(path)
            inside = path.relative_to(root).as_posix()
            yield Found(str(path), inside, path.stat().st_size)


def _check_name(file: Path) -> None:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"the file name {os.fsencode(file)!r} is not UTF-8 and cannot be an id; rename it "
            "(convmv renames whole folders)"
        ) from None


def _fixed_part(pattern: str) -> str:
    """Return the folder in front of the first wildcard, or of the file's name."""
    pieces = pattern.split("/")
    for place, piece in enumerate(pieces[:-1]):
        if _MAGIC.search(piece):
            return "/".join(pieces[:place]) or "/"
    return "/".join(pieces[:-1]) or "/"


def _ranges(pattern: str) -> list[str]:
    """Expand `{000..050}` as WebDataset writes it, zeros kept."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [one for number in numbers for one in _ranges(head + number + tail)]


_TOKENS = re.compile(
    r"(?P<deep>\*\*/)|(?P<many>\*+)|(?P<one>\?)|\[(?P<some>!?[^\]]+)\]|(?P<text>.)"
)


def _regex(pattern: str) -> str:
    """Translate a glob: `*` and `?` stay inside one folder, `**/` spans any number of them."""

    def piece(token: re.Match[str]) -> str:
        if token["some"]:
            inside = token["some"].replace("\\", r"\\").replace("^", r"\^")
            return f"[{'^' + inside[1:] if inside.startswith('!') else inside}]"
        fixed = {"deep": "(?:.*/)?", "many": "[^/]*", "one": "[^/]"}
        return fixed.get(token.lastgroup or "") or re.escape(token[0])

    return "".join(map(piece, _TOKENS.finditer(pattern)))
