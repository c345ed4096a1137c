# SPDX-License-Identifier: Apache-2.0
"""What happens to a step that went wrong: it is not applied, and after several the weights go back.

A step is wrong when its loss or its gradient is not finite, or when its loss is far above those
before it. A wrong step changes nothing; data and schedule go on behind it. Several in a row say
that the weights themselves went wrong: those of the last checkpoint take their place, and training
goes on with the data that comes next. All of it follows from losses that every rank has alike.

Source:
    PaLM (Chowdhery et al. 2022), section 5.1: at a spike start from a checkpoint of before and
    leave out the batches that were seen meanwhile; the same batches harm no other weights.
"""

import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Final

from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.training.checkpoint import KEEP, Checkpoints
from sg4v_ray.training.progress import Progress, RollBack

_WINDOW: Final = 64
"""Applied steps whose median a loss is compared with."""
_FIRST: Final = 16
"""Applied steps before which nothing is compared: a new model's loss falls fast."""
_MOST: Final = 8
"""Times that the weights of one run go back. Ours."""


class TrainingDiverged(Sg4vError):
    """Steps go on going wrong, also with weights of before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """Tells wrong steps, and says when to go back."""

    spike_factor: float | None
    """A loss of more than so many medians is wrong; None looks at no finite loss."""
    rollback_after: int
    """Wrong steps in a row after which the weights go back."""

    def is_wrong(self, progress: Progress, loss: float) -> bool:
        """Say whether a step with this loss must not be applied."""
        if not math.isfinite(loss):
            return True
        if self.spike_factor is None:
            return False
        before = _last_applied(progress)
        if len(before) < _FIRST:
            return False
        return loss > self.spike_factor * statistics.median(before)

    def must_go_back(self, progress: Progress) -> bool:
        """Say whether so many steps went wrong that the weights are to blame."""
        wrong = _wrong_in_a_row(progress)
        return wrong > 0 and wrong % self.rollback_after == 0


def go_back(checkpoints: Checkpoints, progress: Progress, guard: Guard) -> Progress:
    """Put weights of before in place; return where the run stands then. All ranks together.

    The first time those of the newest checkpoint; if these go wrong at once, of the one before, and
    of none older. Before the first checkpoint the run goes on for a while: nothing was harmed yet.

    Raises:
        TrainingDiverged: there are none left, or it has been done too often.
    """
    checkpoints.finish()
    restored, times = None, _times_back(progress)
    if len(progress.rollbacks) < _MOST:
        restored = checkpoints.restore(skip=times, among=KEEP)
    patience = (1 + KEEP) * guard.rollback_after
    if restored is None and not times and _wrong_in_a_row(progress) < patience:
        return progress
    if restored is None:
        raise TrainingDiverged(
            f"the last {_wrong_in_a_row(progress)} steps up to step {progress.step} went wrong "
            f"(loss {progress.losses[-1]:.4g}, gradient norm {progress.grad_norms[-1]:.4g}), and "
            f"there are no earlier weights left to go on with; {len(progress.rollbacks)} times "
            "that was done. Checkpoints are kept. Lower learning_rate, set clip_norm or look at "
            "the samples of these steps, and train another version (--out.version v2)"
        )
    made = RollBack(at=progress.step, to=restored.step)
    return dataclasses.replace(
        progress, updates=restored.updates, rollbacks=(*progress.rollbacks, made)
    )


def _times_back(progress: Progress) -> int:
    """Return how often the weights went back since the last right step."""
    first = progress.step - _wrong_in_a_row(progress)
    return sum(one.at > first for one in progress.rollbacks)


def _wrong_in_a_row(progress: Progress) -> int:
    skipped, count = set(progress.skipped), 0
    while progress.step - 1 - count in skipped:
        count += 1
    return count


def _last_applied(progress: Progress) -> list[float]:
    """Return the losses of the last `_WINDOW` steps that were applied."""
    skipped = set(progress.skipped)
    steps = (step for step in range(progress.step - 1, -1, -1) if step not in skipped)
    return [progress.losses[step] for step in itertools.islice(steps, _WINDOW)]
