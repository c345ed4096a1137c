# SPDX-License-Identifier: Apache-2.0
"""How far a run is: what a checkpoint says beside the state of the optimizer."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Mean loss of the labelled tokens of samples that are not trained on."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBack:
    """After step `at` the weights became those after step `to` again."""

    at: int
    to: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is: with the plan, all of its state that is not the optimizer's."""

    step: int = 0
    """Steps done; the plan gives epoch and position from it."""
    updates: int = 0
    """Updates in the weights: steps without those that were skipped or rolled back."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples, tokens, labels, rejected rows by reason, over all ranks since step 0."""
    losses: tuple[float, ...] = ()
    """Loss of each step."""
    grad_norms: tuple[float, ...] = ()
    """Gradient norm of each step, before clipping."""
    seconds: tuple[float, ...] = ()
    """What each step took: all since the end of the step before, also what came between them."""
    waits_s: tuple[float, ...] = ()
    """What rank 0 waited for the batch of each step."""
    skipped: tuple[int, ...] = ()
    """Steps that were not applied (`training.guard`), counted from 0 as `losses` are."""
    rollbacks: tuple[RollBack, ...] = ()
    held_out: tuple[HeldOut, ...] = ()
    resumed_at: tuple[int, ...] = ()
    """Steps at which a run took over from one that was stopped."""
