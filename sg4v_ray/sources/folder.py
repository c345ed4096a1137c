# SPDX-License-Identifier: Apache-2.0
"""Images that are files: of a folder or a bucket prefix, or those that a pattern names."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import listing

_log = logging.getLogger(__name__)

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd"}
)
"""What is listed. Formats that we do not decode are listed too, so that they are rejected by
name instead of being passed over in silence."""


@identity_keys("Folder", path="path", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """Every image file below a folder or bucket prefix. The id is the path relative to it."""

    path: str
    """Absolute path or URI; workers on every node read from it."""
    name: str = "folder"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(f"{self.path.rstrip('/')}/")

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image file.

        Raises:
            ConfigError: the folder does not exist, or a file's name is not UTF-8.
        """
        yield from image_rows(listing.below(self.path.rstrip("/")), self.name)


@identity_keys("Glob", pattern="pattern", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class Glob:
    """The image files that a pattern names. The id is the path below its fixed part."""

    pattern: str
    """Absolute path or URI with `*`, `?`, `[..]`, `**` or `{000..050}`."""
    name: str = "glob"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(self.pattern)

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image file.

        Raises:
            ConfigError: nothing matches, or a file's name is not UTF-8.
        """
        yield from image_rows(listing.matching(self.pattern), self.name)


def image_rows(found: Iterator[listing.Found], source: str) -> Iterator[ImageRow]:
    """Yield a row for every file that is named like an image; say how many are not."""
    others, example = 0, ""
    for one in found:
        if PurePosixPath(one.name).suffix.lower() in SUFFIXES:
            yield ImageRow(id=one.name, source=source, uri=one.uri, size_bytes=one.size_bytes)
        else:
            others, example = others + 1, example or one.uri
    if others:
        _log.info("left out %d files that are not named like images, e.g. %s", others, example)
