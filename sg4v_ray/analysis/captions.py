# SPDX-License-Identifier: Apache-2.0
"""A report of finished captions: figures as JSON and a gallery to look at.

captions@v, questions@v -> report.json, gallery.html
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sg4v_ray.analysis.easy_vqa import agreement, official
from sg4v_ray.analysis.gallery import GalleryItem, write_gallery
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits, Rejected, open_image
from sg4v_ray.core.records import CaptionRow, Question
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.pixels import read_images

_LIMITS, _FETCH = ImageLimits(), FetchConfig()
_THUMBNAIL = 256
"""Longest side in pixels of an image in the gallery."""


def write_report(
    *, captions: Ref, questions: Ref | None, title: str, where: Where
) -> dict[str, Any]:
    """Write `report.json` and `gallery.html` below the root and return the figures.

    Args:
        questions: easy-VQA questions about the same images; with them the report says how often
            a caption names the official shape and colour.
    """
    storage = where.storage
    manifest = find(storage, captions)
    rows: list[CaptionRow] = read_rows(storage, captions, CaptionRow)
    captioned = sum(1 for one in rows if one.text is not None)
    figures: dict[str, Any] = {
        "captioned": captioned,
        "rejected": len(rows) - captioned,
        "images_per_s": manifest.metrics["rows_per_s"],
    }
    if questions is not None:
        known = official(read_rows(storage, questions, Question))
        found = agreement({one.id: one.text for one in rows}, known)
        figures |= {
            "right_shape": round(found.right_shape, 4),
            "right_shape_of": found.right_shape_of,
            "right_colour": round(found.right_colour, 4),
            "right_colour_of": found.right_colour_of,
        }
    storage.put("report.json", (json.dumps(figures, indent=1) + "\n").encode())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "gallery.html"
        shown = [(key.replace("_", " "), str(value)) for key, value in figures.items()]
        write_gallery(page, title=title, figures=shown, items=items_of(rows))
        storage.put("gallery.html", page.read_bytes())
    return figures


def items_of(
    rows: Iterable[CaptionRow],
    *,
    side: int = _THUMBNAIL,
    limits: ImageLimits = _LIMITS,
    fetch: FetchConfig = _FETCH,
) -> Iterator[GalleryItem]:
    """Yield what a gallery shows of rows; images are read again.

    Args:
        side: their longest side in pixels.
        limits, fetch: as those with which they were read before.
    """
    for row in rows:
        (data,) = read_images([row.uri], limits=limits, fetch=fetch)
        yield GalleryItem(
            id=row.id,
            image=None if isinstance(data, Rejected) else _thumbnail(data, side, limits),
            text=row.text,
            reject=row.reject,
            detail=row.reject_detail,
        )


def _thumbnail(data: bytes, side: int, limits: ImageLimits) -> bytes | None:
    """Return a PNG of an image, or None where there is none to show."""
    image = open_image(data, limits)
    if not isinstance(image, Image.Image):
        return None
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    out = BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
