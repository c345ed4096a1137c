# SPDX-License-Identifier: Apache-2.0
"""Charts of reports: round axes, every value inside the picture, text escaped."""

import re

import pytest

from sg4v_ray.core.charts import bar_chart, histogram, line_chart, nice, number


@pytest.mark.parametrize(
    ("value", "wanted"), [(0, 1), (0.3, 0.5), (1, 1), (1.01, 2), (37, 50), (99, 100), (1200, 2000)]
)
def test_axes_end_at_round_numbers(value: float, wanted: float) -> None:
    assert nice(value) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.333, "0.333"), (12, "12"), (4700, "4700"), (52_000, "52k"), (1_246_901, "1.25M")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_line_stays_inside_its_picture() -> None:
    chart = line_chart("Rate", [(0.0, 0.0), (5.0, 7.3), (10.0, 3.0)], x_unit=" s")
    (points,) = re.findall(r'points="([^"]+)"', chart)
    for point in points.split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 640
        assert 0 <= y <= 220


def test_a_flat_zero_line_is_drawn() -> None:
    assert "polyline" in line_chart("Nothing", [(0.0, 0.0)], x_unit=" s")


def test_labels_are_escaped() -> None:
    chart = bar_chart("Why", [("<script>", 3)])
    assert "<script>" not in chart
    assert "&lt;script&gt;: 3" in chart


def test_a_histogram_counts_every_value_once() -> None:
    bins = histogram([1, 5, 99, 826, 942], bins=10)
    assert sum(count for _, count in bins) == 5
    assert bins[0] == ("0", 3)
    assert histogram([]) == []
