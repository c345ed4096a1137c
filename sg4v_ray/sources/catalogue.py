# SPDX-License-Identifier: Apache-2.0
"""The image sources of the paper: what they are, where they lie, how many there must be.

Source:
    Layout: ShareGPT4Omni/ShareGPT4V@b6f70e9, docs/Data.md. Counts: the published JSON files (COCO
    train2017 118,287 + LCS 558,128 + SAM 570,486 = 1,246,901 of ShareGPT4V-PT; the small sets by
    id). Licences: each data set's own page; they bind whoever downloads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import listing
from sg4v_ray.sources.folder import image_rows

PaperSourceName = Literal[
    "coco", "lcs", "sam", "textcaps", "wikiart", "web-landmark", "web-celebrity"
]


@dataclass(frozen=True, slots=True)
class Entry:
    """One image source of the paper."""

    layout: str
    """Folder below the data root."""
    expected: int
    """Images that the published captions name."""
    licence: str


CATALOGUE: Final[dict[PaperSourceName, Entry]] = {
    "coco": Entry("coco/train2017", 118_287, "images: Flickr terms of use; annotations CC BY 4.0"),
    "lcs": Entry(
        "llava/llava_pretrain/images",
        558_128,
        "LAION, CC3M, SBU: each image belongs to its owner; BLIP captions as LLaVA-Pretrain",
    ),
    "sam": Entry("sam/images", 570_486, "SA-1B Dataset Research License: research only"),
    "textcaps": Entry("share_textvqa/images", 500, "CC BY 4.0; images from Open Images, CC BY 2.0"),
    "wikiart": Entry("wikiart/images", 500, "non-commercial research; works have owners"),
    "web-landmark": Entry("web-landmark/images", 500, "collected from the web: owners' rights"),
    "web-celebrity": Entry("web-celebrity/images", 498, "collected from the web: owners' rights"),
}


@identity_keys("PaperImages", name="name", data_root="data_root")
@dataclass(frozen=True, kw_only=True, slots=True)
class PaperImages:
    """One source of the paper, laid out as the published captions name it.

    The id is the path below the data root, as in the published JSON.
    """

    name: PaperSourceName
    data_root: str
    """Absolute path or URI of the folder that holds `coco/`, `sam/`, `llava/`, ..."""

    def __post_init__(self) -> None:
        listing.check_place(f"{self.data_root.rstrip('/')}/")

    @property
    def expected(self) -> int:
        """Images that the published captions name."""
        return CATALOGUE[self.name].expected

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image file.

        Raises:
            ConfigError: the folder does not exist.
        """
        layout = CATALOGUE[self.name].layout
        found = listing.below(f"{self.data_root.rstrip('/')}/{layout}")
        for row in image_rows(found, self.name):
            yield ImageRow(
                id=f"{layout}/{row.id}", source=row.source, uri=row.uri, size_bytes=row.size_bytes
            )
