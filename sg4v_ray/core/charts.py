# SPDX-License-Identifier: Apache-2.0
"""Two plain charts as SVG, for pages that load nothing: a line over time, and bars.

Colours and fonts come from the page (`core.html`), by class.
"""

import math
from collections.abc import Sequence
from typing import Final

from sg4v_ray.core.html import Markup, element, join

_WIDTH: Final = 640
_HEIGHT: Final = 220
_LEFT: Final = 64
_BOTTOM: Final = 28
_TOP: Final = 12
_TICKS: Final = 4

STYLE: Final = """
svg.chart { width: 100%; max-width: 44rem; height: auto; display: block; }
.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.chart .bar { fill: var(--accent); }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 0.4rem; }
"""


def line_chart(title: str, points: Sequence[tuple[float, float]], *, x_unit: str) -> Markup:
    """Draw values over `x`, from zero up. At least one point is needed."""
    right = max(x for x, _ in points) or 1.0
    top = nice(max(y for _, y in points))
    dots = " ".join(f"{_x(x / right):.1f},{_y(y / top):.1f}" for x, y in points if math.isfinite(y))
    marks = [
        _text(f"{number(right * n / _TICKS)}{x_unit}", _x(n / _TICKS), _HEIGHT - 8, "middle")
        for n in range(_TICKS)
    ]
    marks.append(_text(f"{number(right)}{x_unit}", _WIDTH, _HEIGHT - 8, "end"))
    return _figure(title, [*_grid(top), *marks, element("polyline", class_="line", points=dots)])


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> Markup:
    """Draw labelled bars from zero up; of many bars only some are labelled."""
    top = nice(max(value for _, value in bars))
    width = (_WIDTH - _LEFT) / len(bars)
    step = math.ceil(len(bars) / 10)
    parts = _grid(top)
    for place, (label, value) in enumerate(bars):
        left, height = _LEFT + place * width, (_HEIGHT - _BOTTOM - _TOP) * value / top
        shape = element(
            "rect",
            element("title", f"{label}: {number(value)}"),
            class_="bar",
            x=f"{left + width * 0.08:.1f}",
            y=f"{_HEIGHT - _BOTTOM - height:.1f}",
            width=f"{width * 0.84:.1f}",
            height=f"{height:.1f}",
        )
        parts.append(shape)
        if place % step == 0:
            parts.append(_text(label, left + width / 2, _HEIGHT - 8, "middle"))
    return _figure(title, parts)


def histogram(values: Sequence[float], *, bins: int = 20) -> list[tuple[str, float]]:
    """Count values in bins of equal, round width; the labels are the bins' lower ends."""
    if not values:
        return []
    width = nice(max(values) / bins)
    counts = [0] * (int(max(values) // width) + 1)
    for value in values:
        counts[int(value // width)] += 1
    return [(number(place * width), count) for place, count in enumerate(counts)]


def nice(value: float) -> float:
    """Return the next round number (1, 2 or 5 times a power of ten) at or above a value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def number(value: float) -> str:
    """Write a number for people: 1,200,000 as 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _x(share: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 12) * share


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share


def _grid(top: float) -> list[Markup]:
    lines = []
    for n in range(_TICKS + 1):
        y = _y(n / _TICKS)
        ends: dict[str, str | int] = {"x1": _LEFT, "x2": _WIDTH, "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        lines.append(element("line", class_="grid", **ends))
        lines.append(_text(number(top * n / _TICKS), _LEFT - 8, y + 4, "end"))
    return lines


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _figure(title: str, parts: Sequence[Markup]) -> Markup:
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    svg = element("svg", join(parts), class_="chart", viewBox=box, role="img", aria_label=title)
    return element("figure", element("figcaption", title), svg)
