# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: every sample once an epoch, in an order that no worker count changes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.training.plan import (
    FILLER,
    Lengths,
    Plan,
    padding_share,
    total_steps,
    unknown_lengths,
)

pytestmark = pytest.mark.training

SMALL = Plan(lengths=unknown_lengths(10), global_batch=4, micro_batch=1, total_steps=6, seed=0)


def mixed(num_samples: int, text_rate: float, seed: int) -> Lengths:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(600, 2048, num_samples).astype(np.int32)
    return Lengths(tokens, draw.random(num_samples) >= text_rate)


def _batch(plan: Plan, step: int, world_size: int) -> list[int]:
    """Put the shares of all workers together again, without fillers."""
    shares = [plan.share(step, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "every worker runs as many micro-batches"
    rounds = zip(*shares, strict=True)
    return [index for micros in rounds for one in micros for index in one if index != FILLER]


def _epoch(plan: Plan, epoch: int, world_size: int = 1) -> list[list[int]]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [_batch(plan, step, world_size) for step in steps]


@given(
    num_samples=st.integers(1, 200),
    micro_batch=st.integers(1, 4),
    world_size=st.integers(1, 128),
    window=st.sampled_from([0, 1, 3]),
    micro_tokens=st.sampled_from([None, 3000]),
    seed=st.integers(0, 3),
)
def test_an_epoch_has_every_sample_once_for_any_number_of_workers(
    num_samples: int,
    micro_batch: int,
    world_size: int,
    window: int,
    micro_tokens: int | None,
    seed: int,
) -> None:
    plan = Plan(
        lengths=mixed(num_samples, 0.2, seed),
        global_batch=8 * micro_batch,
        micro_batch=micro_batch,
        total_steps=100,
        seed=seed,
        window=window,
        micro_tokens=micro_tokens if window else None,
    )
    for epoch in range(2):
        batches = _epoch(plan, epoch, world_size)
        assert sorted(index for one in batches for index in one) == list(range(num_samples))
        assert batches == _epoch(plan, epoch, 1), "workers change neither batches nor order"
        assert all(len(one) == plan.global_batch for one in batches[:-2])


def test_the_order_differs_by_epoch_and_seed() -> None:
    first = _epoch(SMALL, 0)
    assert first != _epoch(SMALL, 1)
    assert first != _epoch(replace(SMALL, seed=1), 0)


def test_the_order_is_pinned_so_that_new_software_can_resume_an_old_run() -> None:
    assert _epoch(SMALL, 0) == [[8, 9, 0, 3], [7, 4, 1, 5], [2, 6]]
    tokens = np.arange(10, 0, -1, dtype=np.int32)
    grouped = replace(SMALL, lengths=Lengths(tokens, np.arange(10) % 3 > 0), window=2)
    assert _epoch(grouped, 0) == [[8, 7, 4, 1], [9, 6, 3, 0], [5, 2]]


def test_kinds_are_apart_and_lengths_together_but_for_what_is_left() -> None:
    lengths = mixed(4000, 0.1, 1)
    plan = Plan(lengths=lengths, global_batch=32, micro_batch=8, total_steps=125, seed=1, window=16)
    *batches, rest, _ = _epoch(plan, 0)
    for batch in batches:
        assert len(set(lengths.has_image[batch].tolist())) == 1
    spread = [np.ptp(lengths.tokens[batch]) for batch in batches if lengths.has_image[batch[0]]]
    assert np.median(spread) < 0.1 * (2048 - 600)
    first = [lengths.tokens[batch[0]] for batch in batches]
    assert first != sorted(first), "the order of batches is drawn"
    assert rest != sorted(rest)


def test_a_micro_batch_holds_no_more_tokens_than_it_may_and_no_more_rows() -> None:
    lengths = mixed(500, 0.3, 2)
    plan = Plan(
        lengths=lengths,
        global_batch=64,
        micro_batch=4,
        total_steps=8,
        seed=2,
        window=2,
        micro_tokens=5000,
        image_row=600,
    )
    made = [rows for step in range(plan.steps_per_epoch) for rows in plan.micro_batches(step)]
    assert max(map(len, made)) == 4
    for rows in made:
        joined = 0 if lengths.has_image[list(rows)].any() else 1
        assert len(rows) == 1 or (len(rows) + joined) * max(lengths.tokens[list(rows)]) <= 5000


def test_padding_counts_rows_that_weigh_nothing() -> None:
    lengths = Lengths(np.array([10, 30], np.int32), np.array([False, False]))
    plan = Plan(lengths=lengths, global_batch=2, micro_batch=2, total_steps=1, seed=0)
    assert padding_share(plan) == pytest.approx(20 / 60)
    assert padding_share(replace(plan, image_row=40)) == pytest.approx(1 - 40 / 120)


@pytest.mark.parametrize(
    ("steps", "planned"),
    [
        pytest.param(1, 4, id="a full step"),
        pytest.param(3, 10, id="an epoch"),
        pytest.param(4, 14, id="an epoch and a step"),
        pytest.param(6, 20, id="two epochs"),
    ],
)
def test_planned_samples_are_those_of_all_steps(steps: int, planned: int) -> None:
    assert replace(SMALL, total_steps=steps).num_planned == planned


def test_a_worker_without_work_in_a_round_gets_a_filler() -> None:
    last = [SMALL.share(2, rank=rank, world_size=3) for rank in range(3)]
    assert [sum(one == (FILLER,) for one in share) for share in last] == [0, 0, 1]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1.0, None, 3), (2.0, None, 6), (0.5, None, 2), (2.0, 4, 4)],
)
def test_steps_of_a_run(epochs: float, max_steps: int | None, expected: int) -> None:
    steps = total_steps(num_samples=10, global_batch=4, epochs=epochs, max_steps=max_steps)
    assert steps == expected


def test_a_dataset_without_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="no samples"):
        replace(SMALL, lengths=unknown_lengths(0))
