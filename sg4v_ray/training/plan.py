# SPDX-License-Identifier: Apache-2.0
"""Which samples make up each step: the same list for any number of workers.

The order of an epoch follows from the seed, the epoch and the number of samples alone. A worker
takes its share of the micro-batches of every global batch. The last batch of an epoch is filled
up with `FILLER`, which weighs nothing, so that no sample is dropped and none is seen twice.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from sg4v_ray.core.errors import ConfigError

FILLER = -1
"""In place of a sample number: a row without labels."""

MicroBatch = tuple[int, ...]
"""Sample numbers, or `FILLER`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All steps of a run. The whole state of a run within it is the number of steps done."""

    num_samples: int
    global_batch: int
    micro_batch: int
    total_steps: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError("the dataset has no samples; build it again")
        if self.global_batch % self.micro_batch:
            raise ConfigError(
                f"global_batch {self.global_batch} is no multiple of micro_batch {self.micro_batch}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample was seen once more."""
        return math.ceil(self.num_samples / self.global_batch)

    @property
    def num_planned(self) -> int:
        """Samples of the whole run, each time it is seen."""
        epochs, rest = divmod(self.total_steps, self.steps_per_epoch)
        return epochs * self.num_samples + min(rest * self.global_batch, self.num_samples)

    def check_workers(self, world_size: int) -> None:
        """Raise ConfigError unless every worker gets the same number of micro-batches."""
        if (self.global_batch // self.micro_batch) % world_size:
            raise ConfigError(
                f"global_batch {self.global_batch} in micro-batches of {self.micro_batch} cannot "
                f"be shared by {world_size} workers; change micro_batch or train_workers"
            )

    def share(self, step: int, *, rank: int, world_size: int) -> list[MicroBatch]:
        """Return the micro-batches of one worker in one step, every `world_size`-th of all."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.num_samples)
        batch = list(order[position * self.global_batch : (position + 1) * self.global_batch])
        batch += [FILLER] * (self.global_batch - len(batch))
        starts = range(rank * self.micro_batch, self.global_batch, world_size * self.micro_batch)
        return [tuple(batch[start : start + self.micro_batch]) for start in starts]


def total_steps(
    *, num_samples: int, global_batch: int, epochs: float, max_steps: int | None
) -> int:
    """Return how many steps a run has; `max_steps` overrules `epochs`."""
    if max_steps is not None:
        return max_steps
    return math.ceil(epochs * math.ceil(num_samples / global_batch))


# The prefetch of a new epoch's first step may run while the old epoch's last is made.
@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_samples: int) -> tuple[int, ...]:
    # `random()` of a seed is the same in all Python versions; `shuffle` is not promised to be.
    draw = random.Random(f"{seed}/{epoch}")
    keys = [draw.random() for _ in range(num_samples)]
    return tuple(sorted(range(num_samples), key=keys.__getitem__))
