# SPDX-License-Identifier: Apache-2.0
"""What a captioning made, for people: figures, curves, lengths, rejects, a sample to look at.

captions@v -> captions/v/report.json, report.html (with a gallery of a sample), README.md

Rows are read file by file, so 1.2 million captions are never in memory at once.
"""

import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sg4v_ray.analysis.captions import items_of
from sg4v_ray.analysis.gallery import render_gallery
from sg4v_ray.core import charts
from sg4v_ray.core.artifact import Manifest, Ref, find
from sg4v_ray.core.html import element
from sg4v_ray.core.records import CaptionRow, from_table
from sg4v_ray.core.rows import rows_by_file
from sg4v_ray.core.sampling import draw
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.monitor import curves

SAMPLE = 200
"""Captions and rejects, each, that the page shows: what a browser and a person can take."""


@dataclass(slots=True)
class _Seen:
    """What one pass over all rows found."""

    rows: int = 0
    tokens: int = 0
    chars: list[int] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    captions: list[tuple[float, str, CaptionRow]] = field(default_factory=list)
    refused: list[tuple[float, str, CaptionRow]] = field(default_factory=list)


def write_report(*, captions: Ref, where: Where) -> dict[str, Any]:
    """Write the report beside the rows and return its figures.

    Raises:
        ArtifactMissing: the captions are not finished.
    """
    storage = where.storage
    manifest, home = find(storage, captions), storage.sub(captions.path)
    seen = _look(rows_by_file(home, manifest, None), home.root)
    figures = _figures(manifest, seen)
    home.put("report.json", (json.dumps(figures, indent=1) + "\n").encode())
    home.put("report.html", _page(str(captions), figures, seen, curves(home)).encode())
    home.put("README.md", _card(captions, manifest, figures).encode())
    return figures


def _look(tables: Iterator[pa.Table], where: str) -> _Seen:
    seen = _Seen()
    for table in tables:
        seen.rows += len(table)
        seen.tokens += pc.sum(table["num_tokens"]).as_py() or 0
        seen.sources.update(table["source"].to_pylist())
        seen.rejects.update(one for one in table["reject"].to_pylist() if one is not None)
        good = pc.is_valid(table["text"])
        seen.chars += pc.utf8_length(table["text"].filter(good)).to_pylist()
        _sample(seen.captions, table.filter(good), where)
        _sample(seen.refused, table.filter(pc.invert(good)), where)
    return seen


def _sample(kept: list[tuple[float, str, CaptionRow]], table: pa.Table, where: str) -> None:
    """Keep what `core.sampling.sample` would draw, one table after the other."""
    keys = [(draw(one, 0, "report"), one) for one in table["id"].to_pylist()]
    best = heapq.nsmallest(SAMPLE, range(len(keys)), key=keys.__getitem__)
    rows = from_table(CaptionRow, table.take(pa.array(best, pa.int64())), where=where)
    kept += [(*keys[place], row) for place, row in zip(best, rows, strict=True)]
    kept[:] = heapq.nsmallest(SAMPLE, kept, key=lambda one: one[:2])


def _figures(manifest: Manifest, seen: _Seen) -> dict[str, Any]:
    captioned = len(seen.chars)
    ordered = sorted(seen.chars)
    return {
        "rows": seen.rows,
        "captioned": captioned,
        "rejected": seen.rows - captioned,
        "rejected_by_reason": dict(seen.rejects.most_common()),
        "images_per_s": manifest.metrics.get("rows_per_s"),
        "tokens": seen.tokens,
        "mean_chars": round(sum(ordered) / captioned, 1) if captioned else None,
        "median_chars": ordered[captioned // 2] if captioned else None,
        "sources": dict(seen.sources.most_common()),
    }


def _page(
    title: str, figures: dict[str, Any], seen: _Seen, runs: list[list[dict[str, Any]]]
) -> str:
    shown = [
        (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for key, value in figures.items()
        if not isinstance(value, dict) and value is not None
    ]
    plots = []
    for number, curve in enumerate(runs, start=1):
        rates = _rates(curve)
        if rates:
            name = "Images a second" + (f", run {number}" if len(runs) > 1 else "")
            plots.append(charts.line_chart(name, rates, x_unit=" s"))
    if seen.chars:
        plots.append(charts.bar_chart("Captions by characters", charts.histogram(seen.chars)))
    if seen.rejects:
        plots.append(charts.bar_chart("Rejected", seen.rejects.most_common()))
    rows = [row for _, _, row in (*seen.refused, *seen.captions)]
    above = element("section", *plots, class_="charts")
    return render_gallery(
        title=title, figures=shown, items=items_of(rows), above=above, style=charts.STYLE
    )


def _rates(curve: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Turn counts over seconds into rates."""
    return [
        (
            after["seconds"],
            (after["rows"] - before["rows"]) / (after["seconds"] - before["seconds"]),
        )
        for before, after in itertools.pairwise(curve)
        if after["seconds"] > before["seconds"]
    ]


def _card(captions: Ref, manifest: Manifest, figures: dict[str, Any]) -> str:
    """Return the card of the captions: Markdown with the head that data set hubs read."""
    engine = manifest.config.get("engine", {})
    lines = [
        "---",
        "task_categories: [image-to-text]",
        f"pretty_name: {captions}",
        "---",
        "",
        f"# {captions}",
        "",
        f"{figures['captioned']:,} captions of {figures['rows']:,} images, made by a model "
        f"(engine {engine.get('kind')}, {engine.get('dtype')}). The images keep their licences.",
        "",
        "| made from | fingerprint |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in manifest.inputs.items()),
        "",
        "| | |",
        "|---|---|",
        f"| mean length | {figures['mean_chars']} characters |",
        f"| tokens | {figures['tokens']:,} |",
        *(f"| source {key} | {count:,} images |" for key, count in figures["sources"].items()),
        *(
            f"| rejected: {key} | {count:,} images |"
            for key, count in figures["rejected_by_reason"].items()
        ),
        "",
        f"Made {manifest.provenance.get('at')} at commit {manifest.provenance.get('commit')}.",
    ]
    return "\n".join(lines) + "\n"
