# SPDX-License-Identifier: Apache-2.0
"""Images named by a list of URLs: plain lines, or two columns with an id in front."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.image_bytes import open_file
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import listing

_log = logging.getLogger(__name__)


@identity_keys("UrlList", path="path", prefixes="prefixes", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class UrlList:
    """One image a line: `URL`, or `id<TAB>URL`. Empty lines and `#` lines are skipped."""

    path: str
    """Absolute path or URI of the text file."""
    prefixes: tuple[str, ...] = ()
    """Local folders and bucket prefixes that the list may name besides http(s) URLs."""
    name: str = "urls"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(self.path)

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row a line. Without an id of its own, a row's is a hash of its URL, and a URL
        that stands there again is left out.

        Raises:
            ContractError: a line is not UTF-8, or holds no URL or one that is not allowed.
        """
        seen: set[str] = set()
        repeated = 0
        with open_file(self.path) as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode().strip()
                except UnicodeDecodeError:
                    raise ContractError(f"{self.path}, line {number}: not UTF-8") from None
                if not line or line.startswith("#"):
                    continue
                key, _, url = line.rpartition("\t")
                listing.check_named(url, self.prefixes, f"{self.path}, line {number}")
                if not key:
                    key = hashlib.sha256(url.encode()).hexdigest()[:20]
                    if key in seen:
                        repeated += 1
                        continue
                    seen.add(key)
                yield ImageRow(id=key, source=self.name, uri=url, size_bytes=0)
        if repeated:
            _log.warning("%s: %d lines repeat a URL and are left out", self.path, repeated)
