# SPDX-License-Identifier: Apache-2.0
"""From which data set a published record's image is, told by the first folder of its path.

Source: ShareGPT4Omni/ShareGPT4V@b6f70e9, docs/Data.md.
"""

import re
from typing import Final

COCO: Final = "coco"
TEXT: Final = "text"
"""Of records without an image."""
OTHER: Final = "other"
"""Of images in a folder that no published file names."""

_BY_FOLDER: Final = {
    "coco": COCO,
    "llava": "lcs",
    "sam": "sam",
    "share_textvqa": "textcaps",
    "wikiart": "wikiart",
    "web-landmark": "web-landmark",
    "web-celebrity": "web-celebrity",
    "gqa": "gqa",
    "ocr_vqa": "ocr-vqa",
    "textvqa": "textvqa",
    "vg": "vg",
}
_BARE_COCO: Final = re.compile(r"\d{12}\.jpg")
SOURCES: Final = frozenset((*_BY_FOLDER.values(), OTHER))


def source_of(image: str | None) -> str:
    """Return the source of an image path as a published file gives it.

    LLaVA-Instruct-158K names COCO's images without a folder.
    """
    if image is None:
        return TEXT
    folder, _, rest = image.partition("/")
    if not rest:
        return COCO if _BARE_COCO.fullmatch(image) else OTHER
    return _BY_FOLDER.get(folder, OTHER)


def is_bare(image: str | None) -> bool:
    """Say whether a path names a COCO image without a folder."""
    return image is not None and _BARE_COCO.fullmatch(image) is not None
