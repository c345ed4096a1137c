# SPDX-License-Identifier: Apache-2.0
"""Images named by a list of URLs: plain lines, or two columns with an id in front."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.image_bytes import open_file
from sg4v_ray.core.location import is_container
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import listing


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlList:
    """One image a line: `URL`, or `id<TAB>URL`. Empty lines and `#` lines are skipped."""

    path: str
    """Absolute path or URI of the text file."""
    name: str = "urls"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(self.path)

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row a line. Without an id of its own, a row's is a hash of its URL.

        Raises:
            ContractError: a line is not UTF-8 or holds no URL.
        """
        with open_file(self.path) as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode().strip()
                except UnicodeDecodeError:
                    raise ContractError(f"{self.path}, line {number}: not UTF-8") from None
                if not line or line.startswith("#"):
                    continue
                key, _, url = line.rpartition("\t")
                if is_container(url) or ("://" not in url and not url.startswith("/")):
                    raise ContractError(f"{self.path}, line {number}: no URL or path in {line!r}")
                key = key or hashlib.sha256(url.encode()).hexdigest()[:20]
                yield ImageRow(id=key, source=self.name, uri=url, size_bytes=0)
