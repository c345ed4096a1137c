# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every step is that of transformers' cosine schedule."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from sg4v_ray.training.schedule import Schedule


@pytest.mark.parametrize("total_steps", [1, 7, 33, 100, 5197])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
def test_rates_are_those_of_transformers(total_steps: int, warmup_ratio: float) -> None:
    ours = Schedule(peak=2e-5, warmup_ratio=warmup_ratio, total_steps=total_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    theirs = get_cosine_schedule_with_warmup(optimizer, ours.warmup_steps, total_steps)
    for step in range(total_steps):
        assert ours.rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-20)
        optimizer.step()
        theirs.step()


def test_the_warm_up_is_rounded_up_as_in_transformers() -> None:
    assert Schedule(peak=1.0, warmup_ratio=0.03, total_steps=5197).warmup_steps == 156


def test_a_rate_beyond_the_end_stays_at_zero() -> None:
    assert Schedule(peak=1.0, warmup_ratio=0.03, total_steps=10).rate(12) == 0.0
