# SPDX-License-Identifier: Apache-2.0
"""How fast a job is, when it will be done, what it costs, and how many actors it needs.

Pure functions of counts and seconds, so that a scale no machine here has can be tested.
"""

import math
from dataclasses import dataclass
from typing import Final

MARGIN: Final = 1.05
"""Actors are asked for as if there were this much more work: some will restart or come late."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What was measured in a run so far."""

    rows: int
    """Rows that came out of the actors."""
    actor_s: float
    """Seconds of actors that could take rows, summed over the actors."""

    @property
    def rows_per_actor_s(self) -> float:
        """Rows a second of one actor; 0 before the first."""
        return self.rows / self.actor_s if self.actor_s > 0 else 0.0

    def actors_for(self, rows: int, seconds: float) -> int | None:
        """Return how many actors finish `rows` within `seconds`, or None if none can be told."""
        if seconds <= 0 or not self.rows_per_actor_s:
            return None
        return max(1, math.ceil(rows * MARGIN / (self.rows_per_actor_s * seconds)))

    def seconds_for(self, rows: int, actors: int) -> float | None:
        """Return how long `actors` take for `rows`, or None before anything was measured."""
        speed = self.rows_per_actor_s * actors
        return rows / speed if speed else None


def dollars(gpu_s: float, gpu_hour_usd: float) -> float:
    """Return what GPU seconds cost."""
    return gpu_s / 3600 * gpu_hour_usd


def expected_dollars(spent_usd: float, done: int, left: int) -> float | None:
    """Return what a job will have cost when `left` more rows cost as much as `done` rows did."""
    return spent_usd * (done + left) / done if done else None
