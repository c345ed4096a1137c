# SPDX-License-Identifier: Apache-2.0
"""Throughput, remaining time, cost and pool size of a job.

Pure functions of counts and seconds, so that a scale beyond this machine can be tested.
"""

import math
from dataclasses import dataclass
from typing import Final

MARGIN: Final = 1.05
"""The pool is sized for this much more work: some actors restart or start late."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """The measured rows and actor time of a run."""

    rows: int
    """Rows that left the actors."""
    actor_s: float
    """Seconds for which actors accepted rows, summed over the actors."""

    @property
    def rows_per_actor_s(self) -> float:
        """Rows per second of one actor; 0 before the first row."""
        return self.rows / self.actor_s if self.actor_s > 0 else 0.0

    def actors_for(self, rows: int, seconds: float) -> int | None:
        """Return how many actors finish `rows` within `seconds`; None if no number does."""
        if seconds <= 0 or not self.rows_per_actor_s:
            return None
        return max(1, math.ceil(rows * MARGIN / (self.rows_per_actor_s * seconds)))

    def seconds_for(self, rows: int, actors: int) -> float | None:
        """Return how long `actors` take for `rows`; None before the first row."""
        speed = self.rows_per_actor_s * actors
        return rows / speed if speed else None


def dollars(gpu_s: float, gpu_hour_usd: float) -> float:
    """Return the cost of GPU seconds in US dollars."""
    return gpu_s / 3600 * gpu_hour_usd


def expected_dollars(spent_usd: float, done: int, left: int) -> float | None:
    """Return the cost of a whole job if `left` more rows cost as much per row as `done` rows."""
    return spent_usd * (done + left) / done if done else None
