# SPDX-License-Identifier: Apache-2.0
"""The figures of `make show-plan`: a job over 20,000,000 rows starts, stays small and commits."""

import json
from pathlib import Path

import pytest

from jobs.bench_plan import RATIOS

pytestmark = pytest.mark.shown

FILE = Path(__file__).parents[2] / "runs" / "bench-plan" / RATIOS


@pytest.fixture(scope="module")
def ratios() -> dict[str, float]:
    """The figures that the bench stored."""
    return json.loads(FILE.read_text())


def test_the_index_has_twenty_million_rows_and_the_last_million_was_made(
    ratios: dict[str, float],
) -> None:
    assert (ratios["rows"], ratios["done"]) == (20_000_000, 19_000_000)


@pytest.mark.parametrize(
    ("figure", "limit"), [("driver_peak_mb", 1000), ("first_part_s", 60), ("commit_s", 60)]
)
def test_a_job_over_it_starts_stays_small_and_commits(
    ratios: dict[str, float], figure: str, limit: float
) -> None:
    assert ratios[figure] < limit


def test_the_driver_needs_as_much_memory_as_for_a_million_rows(ratios: dict[str, float]) -> None:
    assert 0.8 < ratios["driver_peak_over_small"] < 1.2
