# SPDX-License-Identifier: Apache-2.0
"""Captions of a teacher for people to read, by source, before anything is trained on them.

teacher-captions@v -> teacher-captions/v/review.html, review.json

What is shown is a hold-out: the same ids that a dataset with the same `HoldOut` leaves out.
"""

import json
import logging
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from sg4v_ray.analysis.captions import items_of
from sg4v_ray.analysis.gallery import GalleryItem, render_gallery
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.html import Markup, element
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import TeacherCaptionRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.core.where import Where

_log = logging.getLogger(__name__)

PAGE: Final = "review.html"
IDS: Final = "review.json"
_SIDE: Final = 384
"""Longest side in pixels of an image: what a caption says of it has to be seen."""
_STYLE: Final = """
.wall { grid-template-columns: repeat(auto-fill, minmax(min(100%, 42rem), 1fr)); }
article { grid-template-columns: minmax(8rem, 20rem) minmax(0, 1fr); } .picture { width: 100%; }
table { border-collapse: collapse; margin: 0 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; } td + td { text-align: right; }
details { margin: 0 0 1rem; } summary { cursor: pointer; } dt { font-weight: 600; }
dd { margin: 0 0 0.6rem; max-width: 60rem; }
"""


def write_review(
    *,
    captions: Ref,
    hold_out: HoldOut,
    prompts: Callable[[str], str],
    flag: Callable[[str, str], str | None],
    limits: ImageLimits,
    fetch: FetchConfig,
    where: Where,
) -> dict[str, Any]:
    """Write the page and the ids that it shows beside the rows; return the figures by source.

    Args:
        prompts: gives the text of a prompt by its name.
        flag: says what may be wrong with a caption, given its text and the prompt's name.
        limits, fetch: how the images are read, as in the collection.

    Raises:
        ArtifactMissing: the captions are not finished.
    """
    storage = where.storage
    paid = find(storage, captions).metrics.get("usd", 0.0)
    rows: list[TeacherCaptionRow] = read_rows(storage, captions, TeacherCaptionRow)
    chosen = hold_out.of((row.id, row.source) for row in rows)
    shown = sorted((row for row in rows if row.id in chosen), key=lambda row: (row.source, row.id))
    large = items_of(shown, side=_SIDE, limits=limits, fetch=fetch)
    items = [_item(item, row, flag) for item, row in zip(large, shown, strict=True)]
    if lacking := sum(item.image is None for item in items):
        _log.warning("%d of %d images cannot be shown: they cannot be read", lacking, len(items))
    figures = {source: _figures(rows, source) for source in sorted({row.source for row in rows})}
    page = render_gallery(
        title=f"{captions}: {len(shown)} captions to read",
        figures=[("rows", f"{len(rows):,}"), ("dollars", f"{paid:,.2f}")],
        items=items,
        above=element("div", _table(figures), _prompts(shown, prompts)),
        style=_STYLE,
    )
    home = storage.sub(captions.path)
    home.put(PAGE, page.encode())
    home.put(IDS, (json.dumps({"held_out": sorted(chosen)}, indent=1) + "\n").encode())
    return figures


def _item(
    item: GalleryItem, row: TeacherCaptionRow, flag: Callable[[str, str], str | None]
) -> GalleryItem:
    notes = [f"asked: {row.prompt}", f"${row.usd:.4f}"]
    if row.text is not None:
        notes.insert(1, f"{len(row.text)} characters, {row.num_tokens} tokens")
        if (flagged := flag(row.text, row.prompt)) is not None:
            return replace(
                item, group=row.source, reject="flagged", detail=flagged, notes=tuple(notes)
            )
    return replace(item, group=row.source, notes=tuple(notes))


def _figures(rows: list[TeacherCaptionRow], source: str) -> dict[str, Any]:
    mine = [row for row in rows if row.source == source]
    lengths = [len(row.text) for row in mine if row.text is not None]
    return {
        "images": len(mine),
        "captions": len(lengths),
        "rejected": len(mine) - len(lengths),
        "mean characters": round(statistics.fmean(lengths)) if lengths else None,
        "dollars": round(sum(row.usd for row in mine), 4),
    }


def _table(figures: dict[str, dict[str, Any]]) -> Markup:
    columns = list(next(iter(figures.values())))
    head = element("tr", *(element("th", name) for name in ("source", *columns)))
    body = [
        element("tr", element("td", source), *(element("td", _text(one)) for one in row.values()))
        for source, row in figures.items()
    ]
    return element("table", head, *body)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"


def _prompts(rows: list[TeacherCaptionRow], prompts: Callable[[str], str]) -> Markup:
    said = [
        part
        for name in sorted({row.prompt for row in rows})
        for part in (element("dt", name), element("dd", prompts(name)))
    ]
    return element("details", element("summary", "What was asked"), element("dl", *said))
