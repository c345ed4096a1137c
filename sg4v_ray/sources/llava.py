# SPDX-License-Identifier: Apache-2.0
"""The images that a published LLaVA JSON names, found below one data folder.

The file is also the packing list: what it names and the folder lacks is counted, which half of
those who repeated ShareGPT4V found out in the middle of training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.image_bytes import open_file
from sg4v_ray.core.llava_json import read_records
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import listing


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
            ContractError: the file is no such JSON, or a path leads out of the folder.
        """
        root = self.images.rstrip("/")
        there = {one.name: one.size_bytes for one in listing.below(root)}
        seen: set[str] = set()
        with open_file(self.json) as file:
            for record in read_records(file, where=self.json):
                path = record.get("image")
                if path is None:
                    continue
                if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/"):
                    raise ContractError(
                        f"{self.json}: the image {path!r} of {record.get('id')!r} is no path "
                        f"below {root}"
                    )
                if path in seen:
                    continue
                seen.add(path)
                size = there.get(path, 0)
                yield ImageRow(id=path, source=self.name, uri=f"{root}/{path}", size_bytes=size)
