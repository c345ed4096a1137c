# SPDX-License-Identifier: Apache-2.0
"""Which samples make up each step: the same list for any number of workers.

    shuffled by seed and epoch -> images apart from text -> windows sorted by length
        -> global batches, shuffled -> micro-batches of neighbours -> every W-th to a worker

Rows of one micro-batch are about equally long, so little is padding; so are the micro-batches
that the workers run at one time, so none waits for another. No sample is dropped and none is seen
twice in an epoch: its last batches hold what is left of both kinds, and may be smaller. (The
published sampler sorts inside a global batch and deals out, so every worker holds long and short.)
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from sg4v_ray.core.errors import ConfigError

FILLER: Final = -1
"""In place of a sample number: a row that weighs nothing."""

MicroBatch = tuple[int, ...]
"""Sample numbers, or one `FILLER` where a worker has nothing to do in a round."""
Numbers = npt.NDArray[np.int32]
_KEPT_EPOCHS: Final = 2
"""The first step of an epoch may be prefetched while the last of the one before is made."""


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """What a plan knows of the samples of a dataset."""

    tokens: Numbers
    """(samples,) tokens of each row: image tokens included, cut at `max_length`."""
    has_image: npt.NDArray[np.bool_]
    """(samples,)"""

    def __len__(self) -> int:
        return len(self.tokens)


def unknown_lengths(num_samples: int) -> Lengths:
    """Return equal lengths, for a plan that sorts nothing."""
    return Lengths(np.zeros(num_samples, np.int32), np.ones(num_samples, np.bool_))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All steps of a run. The whole state of a run within it is the number of steps done."""

    lengths: Lengths
    global_batch: int
    """Samples of one optimizer step."""
    micro_batch: int
    """Samples of a micro-batch, at most."""
    total_steps: int
    seed: int
    window: int = 0
    """Global batches that are sorted by length together; 0 sorts nothing."""
    micro_tokens: int | None = None
    """Tokens of a micro-batch, at most, padding included; needs a window."""
    image_row: int = 0
    """Tokens of the row without weight that joins a micro-batch without an image."""
    _epochs: dict[int, list[Numbers]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not len(self.lengths):
            raise ConfigError("the dataset has no samples; build it again")

    @property
    def num_samples(self) -> int:
        """Samples of the dataset."""
        return len(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample was seen once more."""
        return math.ceil(self.num_samples / self.global_batch)

    @property
    def num_planned(self) -> int:
        """Samples of the whole run, each time it is seen."""
        epochs, rest = divmod(self.total_steps, self.steps_per_epoch)
        return epochs * self.num_samples + min(rest * self.global_batch, self.num_samples)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return all micro-batches of a step, the shortest rows first where they are sorted."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return list(self._cut(self._epoch(epoch)[position]))

    def share(self, step: int, *, rank: int, world_size: int) -> list[MicroBatch]:
        """Return the micro-batches of one worker, as many as every other worker has."""
        made = self.micro_batches(step)
        rounds = math.ceil(len(made) / world_size)
        made += [(FILLER,)] * (rounds * world_size - len(made))
        return made[rank::world_size]

    def _epoch(self, epoch: int) -> list[Numbers]:
        """Return the global batches of an epoch."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._make_epoch(random.Random(f"{self.seed}/{epoch}"))
        return self._epochs[epoch]

    def _make_epoch(self, draw: random.Random) -> list[Numbers]:
        order = _shuffled(draw, self.num_samples)
        if not self.window:
            return _split(order, self.global_batch)
        has_image = self.lengths.has_image[order]
        batches: list[Numbers] = []
        left: list[Numbers] = []
        for kind in (order[has_image], order[~has_image]):
            full = len(kind) // self.global_batch * self.global_batch
            for window in _split(kind[:full], self.window * self.global_batch):
                batches += _split(self._sorted(window), self.global_batch)
            left.append(self._sorted(kind[full:]))
        places = _shuffled(draw, len(batches))
        return [batches[place] for place in places] + _split(
            np.concatenate(left), self.global_batch
        )

    def _sorted(self, samples: Numbers) -> Numbers:
        return samples[np.argsort(self.lengths.tokens[samples], kind="stable")]

    def _cut(self, batch: Numbers) -> Iterator[MicroBatch]:
        if self.micro_tokens is None:
            for piece in _split(batch, self.micro_batch):
                yield tuple(piece.tolist())
            return
        rows: list[int] = []
        for sample in batch.tolist():
            more = [*rows, sample]
            if rows and (len(more) > self.micro_batch or self.held(more) > self.micro_tokens):
                yield tuple(rows)
                more = [sample]
            rows = more
        yield tuple(rows)

    def held(self, rows: list[int]) -> int:
        """Return the tokens that a worker holds for a micro-batch, padding included."""
        longest, extra = int(self.lengths.tokens[rows].max()), 0
        if self.image_row and not self.lengths.has_image[rows].any():
            longest, extra = max(longest, self.image_row), 1
        return (len(rows) + extra) * longest


def padding_share(plan: Plan, epoch: int = 0) -> float:
    """Return the share of an epoch's tokens that are padding, or a row without weight."""
    first = epoch * plan.steps_per_epoch
    steps = range(first, first + plan.steps_per_epoch)
    whole = sum(plan.held(list(rows)) for step in steps for rows in plan.micro_batches(step))
    return 1 - int(plan.lengths.tokens.sum(dtype=np.int64)) / whole


def total_steps(
    *, num_samples: int, global_batch: int, epochs: float, max_steps: int | None
) -> int:
    """Return how many steps a run has; `max_steps` overrules `epochs`."""
    if max_steps is not None:
        return max_steps
    return math.ceil(epochs * math.ceil(num_samples / global_batch))


def _shuffled(draw: random.Random, count: int) -> Numbers:
    # `random()` of a seed is the same in all Python versions; `shuffle` is not promised to be,
    # nor are numpy's generators.
    keys = np.fromiter((draw.random() for _ in range(count)), np.float64, count)
    return np.argsort(keys, kind="stable").astype(np.int32)


def _split(samples: Numbers, size: int) -> list[Numbers]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]
