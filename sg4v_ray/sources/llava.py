# SPDX-License-Identifier: Apache-2.0
"""The images that a published LLaVA JSON names, found below one data folder.

The file is also the packing list: what it names and the folder lacks is counted, which half of
those who repeated ShareGPT4V found out in the middle of training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.llava_file import records_at
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import listing


@identity_keys("LlavaImages", json="json", images="images", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaImages:
    """Every image of a LLaVA JSON, once each. The id is the path that the JSON gives."""

    json: str
    """Absolute path or URI of the JSON array."""
    images: str
    """Absolute path or URI of the folder that the records' `image` paths are relative to."""
    name: str = "llava"
    """Source name stored with each row."""

    def __post_init__(self) -> None:
        listing.check_place(self.json)
        listing.check_place(f"{self.images.rstrip('/')}/")

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image, those that are not there too; their size is 0.

        Raises:
            ConfigError: there is no such file or folder.
            ContractError: the file is no such JSON, or a path leads out of the folder.
        """
        root = self.images.rstrip("/")
        there = {one.name: one.size_bytes for one in listing.below(root)}
        seen: set[str] = set()
        for element in records_at(self.json):
            path = element.value.get("image")
            if path is not None and path not in seen:
                seen.add(path)
                size = there.get(path, 0)
                yield ImageRow(id=path, source=self.name, uri=f"{root}/{path}", size_bytes=size)
