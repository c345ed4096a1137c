# SPDX-License-Identifier: Apache-2.0
"""List files below a folder or prefix, local or in a bucket, by a glob pattern."""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import InvalidPathError

from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.location import is_container
from sg4v_ray.core.storage import Storage, is_local, local_path

_log = logging.getLogger(__name__)
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


def check_named(uri: str, prefixes: tuple[str, ...], where: str) -> None:
    """Check a URI that stands in somebody's list: http(s), or below a prefix that is trusted.

    The list's author may be a stranger, and files and buckets are read with the cluster's rights.

    Raises:
        ContractError: it is neither.
    """
    trusted = tuple(f"{one.rstrip('/')}/" for one in prefixes)
    if is_container(uri) or not uri.startswith(("http://", "https://", *trusted)):
        raise ContractError(
            f"{where} names {uri!r}, no URL below http(s)://. Files and buckets that a list may "
            "name are given with --step.0.config.sources.0.prefixes, e.g. /data/ s3://bucket/"
        )
    if ".." in uri.split("/") and not uri.startswith("http"):
        raise ContractError(f"{where} names {uri!r}; a path with '..' may lead anywhere")


def below(folder: str) -> Iterator[Found]:
    """Yield every file below a folder, in an order that does not change.

    Raises:
        ConfigError: the folder is local and does not exist, a folder below it cannot be read, or
            a name is not UTF-8 or no path.
    """
    if is_local(folder):
        yield from _below_local(local_path(folder))
        return
    root = Storage(folder)
    try:
        batches = obstore.list(root.open())
        found = sorted((one["path"], one["size"]) for batch in batches for one in batch)
    except InvalidPathError as error:
        raise ConfigError(f"{folder} has a key that is no path; rename it: {error}") from error
    for path, size in found:
        yield Found(root.uri(path), path, size)


def matching(pattern: str) -> Iterator[Found]:
    """Yield the files that a path or URI with `*`, `?`, `[..]`, `**` or `{000..050}` names.

    Raises:
        ConfigError: nothing matches, or not every number of a range does.
    """
    folder = _fixed_part(pattern)
    rest = pattern.removeprefix(folder).lstrip("/")
    wanted = {one: re.compile(_regex(one)) for one in _ranges(rest)}
    without = set(wanted)
    for one in below(folder):
        for name, regex in wanted.items():
            if regex.fullmatch(one.name):
                without.discard(name)
                yield one
                break
    if len(without) == len(wanted):
        raise ConfigError(f"no file matches {pattern}; check the path (** also matches folders)")
    if without:
        raise ConfigError(
            f"{len(without)} of the {len(wanted)} names of {pattern} match no file, e.g. "
            f"{min(without)}; get these too, or name only what is there"
        )


def _below_local(root: Path) -> Iterator[Found]:
    if not root.is_dir():
        raise ConfigError(
            f"the folder {root} does not exist on this machine; give the source's place with a "
            "flag such as --step.0.config.sources.0.path /absolute/path"
        )
    # Data folders are often links; one that leads to a folder above it would never end.
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        here = os.path.realpath(folder)
        folders[:] = sorted(
            one for one in folders if not _leads_up(os.path.join(folder, one), here)
        )
        for name in sorted(files):
            path = Path(folder, name)
            _check_name(path)
            inside = path.relative_to(root).as_posix()
            yield Found(str(path), inside, _size(path))


def _refuse(error: OSError) -> None:
    raise ConfigError(
        f"the folder {error.filename} cannot be read ({error.strerror}); its images would be "
        "missing without a word. Make it readable, or move it away"
    ) from error


def _leads_up(path: str, folder: str) -> bool:
    if not os.path.islink(path) or not f"{folder}/".startswith(f"{os.path.realpath(path)}/"):
        return False
    _log.warning("%s is a link to a folder above it and is not followed", path)
    return True


def _size(path: Path) -> int:
    """Return a file's size; 0 for a link that leads nowhere, which is rejected later."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
