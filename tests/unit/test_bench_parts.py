# SPDX-License-Identifier: Apache-2.0
"""Memory growth is counted after the warm-up, in runs that are long enough for it."""

from typing import Any

import pytest

from jobs._bench_parts import settled_s


def curve(rows: int, *, rows_per_s: int) -> list[dict[str, Any]]:
    """Return the points of a run, 5 s apart."""
    return [
        {"seconds": float(seconds), "rows": seconds * rows_per_s}
        for seconds in range(0, rows // rows_per_s + 1, 5)
    ]


@pytest.mark.parametrize(
    ("rows", "rows_per_s", "wanted_s"),
    [
        pytest.param(1_200_000, 3_000, 120, id="the warm-up, if a sixth is made earlier"),
        pytest.param(1_200_000, 1_000, 200, id="a sixth, if it takes longer"),
        pytest.param(300_000, 3_000, 50, id="half, if the run ends before"),
    ],
)
def test_growth_is_counted_from(rows: int, rows_per_s: int, wanted_s: int) -> None:
    assert settled_s(curve(rows, rows_per_s=rows_per_s), rows) == wanted_s
