# SPDX-License-Identifier: Apache-2.0
"""Images of a folder on a disk that every node sees."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd"}
)
"""What is listed. Formats that we do not decode are listed too, so that they are rejected by
name instead of being passed over in silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """Every image file below a folder. The id is the path relative to it."""

    path: str
    """Absolute path; workers on every node read from it."""
    name: str = "folder"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        if not Path(self.path).is_absolute():
            raise ConfigError(
                f"the image folder {self.path!r} is relative; write {Path(self.path).absolute()}"
            )

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image file, in path order.

        Raises:
            ConfigError: the folder does not exist, or a file's name is not UTF-8.
        """
        root = Path(self.path)
        if not root.is_dir():
            raise ConfigError(
                f"the image folder {self.path} does not exist on this machine; name one with "
                "--step.0.config.sources.0.path /absolute/path"
            )
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                _check_name(file)
                yield ImageRow(
                    id=file.relative_to(root).as_posix(),
                    source=self.name,
                    uri=str(file),
                    size_bytes=file.stat().st_size,
                )


def _check_name(file: Path) -> None:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"the file name {os.fsencode(file)!r} is not UTF-8 and cannot be an id; rename it "
            "(convmv renames whole folders)"
        ) from None
