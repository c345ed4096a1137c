# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: every sample once an epoch, in an order that no worker count changes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.training.plan import FILLER, Plan, total_steps

SMALL = Plan(num_samples=10, global_batch=4, micro_batch=1, total_steps=6, seed=0)


def _batch(plan: Plan, step: int, world_size: int) -> list[int]:
    """Put the shares of all workers together again."""
    shares = [plan.share(step, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "every worker takes as many steps"
    return [index for micros in zip(*shares, strict=True) for one in micros for index in one]


@given(
    num_samples=st.integers(1, 60),
    micro_batch=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 3),
)
def test_an_epoch_has_every_sample_once_and_fillers_only_at_its_end(
    num_samples: int, micro_batch: int, world_size: int, seed: int
) -> None:
    plan = Plan(
        num_samples=num_samples,
        global_batch=8 * micro_batch,
        micro_batch=micro_batch,
        total_steps=100,
        seed=seed,
    )
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [index for step in steps for index in _batch(plan, step, world_size)]
        assert sorted(seen[:num_samples]) == list(range(num_samples))
        assert set(seen[num_samples:]) <= {FILLER}
        assert len(seen) == len(steps) * plan.global_batch


@given(step=st.integers(0, 5))
def test_the_number_of_workers_does_not_change_a_batch(step: int) -> None:
    assert _batch(SMALL, step, 1) == _batch(SMALL, step, 2) == _batch(SMALL, step, 4)


def test_the_order_differs_by_epoch_and_seed() -> None:
    first = [_batch(SMALL, step, 1) for step in range(3)]
    assert first != [_batch(SMALL, step, 1) for step in range(3, 6)]
    assert first != [_batch(replace(SMALL, seed=1), step, 1) for step in range(3)]


def test_the_order_is_pinned_so_that_a_new_python_can_resume_an_old_run() -> None:
    epoch = [_batch(SMALL, step, 1) for step in range(3)]
    assert epoch == [[8, 9, 0, 3], [7, 4, 1, 5], [2, 6, FILLER, FILLER]]


@pytest.mark.parametrize(
    ("steps", "planned"),
    [
        pytest.param(1, 4, id="a full step"),
        pytest.param(3, 10, id="an epoch, its fillers not counted"),
        pytest.param(4, 14, id="an epoch and a step"),
        pytest.param(6, 20, id="two epochs"),
    ],
)
def test_planned_samples_do_not_count_fillers(steps: int, planned: int) -> None:
    assert replace(SMALL, total_steps=steps).num_planned == planned


def test_fillers_are_shared_among_workers_by_micro_batch() -> None:
    last = [SMALL.share(2, rank=rank, world_size=2) for rank in range(2)]
    assert [sum(one == (FILLER,) for one in share) for share in last] == [1, 1]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1.0, None, 3), (2.0, None, 6), (0.5, None, 2), (2.0, 4, 4)],
)
def test_steps_of_a_run(epochs: float, max_steps: int | None, expected: int) -> None:
    steps = total_steps(num_samples=10, global_batch=4, epochs=epochs, max_steps=max_steps)
    assert steps == expected


def test_what_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match="no samples"):
        replace(SMALL, num_samples=0)
    with pytest.raises(ConfigError, match="no multiple of micro_batch 3"):
        replace(SMALL, micro_batch=3)
    with pytest.raises(ConfigError, match="cannot be shared by 3 workers"):
        SMALL.check_workers(3)
