# SPDX-License-Identifier: Apache-2.0
"""Images inside uncompressed tar archives, as WebDataset and SA-1B ship them.

Only headers are read. Nothing is unpacked or unpickled, and a member's name is an id, never a
path; a row says at which byte its image begins.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.image_bytes import open_file
from sg4v_ray.core.location import Span
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import listing
from sg4v_ray.sources.folder import SUFFIXES


@identity_keys("Tars", shards="shards", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class Tars:
    """Every image of some tar archives. The id is `shard/member`, both without their suffix."""

    shards: str
    """Absolute path or URI, may hold `*`, `?`, `[..]`, `**` or `{000000..000050}`."""
    name: str = "tars"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(self.shards)

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image, in the archives' order.

        Raises:
            ConfigError: no archive matches.
            ContractError: a file is no uncompressed tar, or ends early.
        """
        for shard in listing.matching(self.shards):
            stem = shard.name.removesuffix(".tar")
            for member in _members(shard.uri):
                # A name that is not UTF-8 was read as surrogates, which no table can hold.
                name = member.name.encode("utf-8", "surrogateescape")
                path = PurePosixPath(name.decode("utf-8", "backslashreplace"))
                if member.isreg() and path.suffix.lower() in SUFFIXES:
                    yield ImageRow(
                        id=f"{stem}/{path.with_suffix('')}",
                        source=self.name,
                        uri=str(Span(shard.uri, member.offset_data, member.size)),
                        size_bytes=member.size,
                    )


def _members(uri: str) -> Iterator[tarfile.TarInfo]:
    with open_file(uri) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield from archive
        except tarfile.TarError as error:
            raise ContractError(
                f"{uri} is no whole, uncompressed tar ({error}). Images are read by their place "
                "in it: unpack a compressed one with `gunzip`, download a broken one again"
            ) from error
