# SPDX-License-Identifier: Apache-2.0
"""The figures that `make show-captioning`'s bench left are those that captioning at scale needs."""

import json
from pathlib import Path

import pytest

from jobs.bench_captions import RATIOS

pytestmark = pytest.mark.shown

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def ratios() -> dict[str, float]:
    """What each case of the bench left, together."""
    found: dict[str, float] = {}
    for file in RUNS.glob(f"bench-*/{RATIOS}"):
        found |= json.loads(file.read_text())
    return found


@pytest.mark.parametrize(
    ("figure", "least"),
    [
        ("job_over_bare", 0.90),
        ("job_over_published", 6.0),
        ("control_plane_rows_per_s", 1500),
        ("scaling_64_over_1", 0.95),
    ],
)
def test_it_is_fast_enough(ratios: dict[str, float], figure: str, least: float) -> None:
    assert ratios[figure] >= least


@pytest.mark.parametrize(
    ("figure", "most"), [("memory_end_over_early", 1.15), ("driver_mb", 700), ("restart_s", 60)]
)
def test_it_stays_small_and_starts_again_soon(
    ratios: dict[str, float], figure: str, most: float
) -> None:
    assert ratios[figure] <= most
