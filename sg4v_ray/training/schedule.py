# SPDX-License-Identifier: Apache-2.0
"""The learning rate of a step: linear warm-up, then half a cosine down to zero."""

import math
from dataclasses import dataclass
from typing import Final

SCALE: Final = "scale"
"""Key of an optimizer's parameter group: its learning rate as a share of the schedule's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A pure function of the step: nothing to save, nothing to restore.

    Source: transformers' `get_cosine_schedule_with_warmup`, and its rounding of `warmup_ratio`.
    """

    peak: float
    warmup_ratio: float
    total_steps: int

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak; the first of them has the rate 0, as in transformers."""
        return math.ceil(self.total_steps * self.warmup_ratio)

    def rate(self, step: int) -> float:
        """Return the learning rate of the update from `step` to `step + 1`."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        rest = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / rest)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))
