# SPDX-License-Identifier: Apache-2.0
"""The figures of `make show-captioning` and `make show-captioning-engine` keep their limits."""

import json
from pathlib import Path

import pytest

from jobs.bench_captions import RATIOS

pytestmark = pytest.mark.shown

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def ratios() -> dict[str, float]:
    """The ratios of each case of the bench, together."""
    found: dict[str, float] = {}
    for file in RUNS.glob(f"bench-*/{RATIOS}"):
        found |= json.loads(file.read_text())
    return found


@pytest.mark.parametrize(
    ("figure", "least"),
    [
        ("job_over_bare", 0.97),
        ("job_over_published", 6.0),
        ("control_plane_rows_per_s", 3000),
        ("control_plane_over_old", 1.0),
        ("scaling_64_over_1", 0.98),
    ],
)
def test_it_is_fast_enough(ratios: dict[str, float], figure: str, least: float) -> None:
    assert ratios[figure] >= least


@pytest.mark.parametrize(
    ("figure", "most"), [("memory_end_over_early", 1.05), ("driver_mb", 700), ("restart_s", 25)]
)
def test_it_stays_small_and_resumes_soon(
    ratios: dict[str, float], figure: str, most: float
) -> None:
    assert ratios[figure] <= most
