# SPDX-License-Identifier: Apache-2.0
"""A step that went wrong changes nothing, weights that went wrong become those of before."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sg4v_ray.training import checkpoint, launch, loop, worker
from sg4v_ray.training.guard import Guard, TrainingDiverged
from sg4v_ray.training.job import Outcome
from sg4v_ray.training.progress import HeldOut, Progress, RollBack
from tests.with_ray.ranks import Phase, run_phase
from tests.with_ray.test_training_loop import (
    SHORT,
    STEPS,
    Listener,
    Run,
    Stopped,
    run,
    site,
    state_of,
)
from tests.with_ray.training_site import make_site

__all__ = ["run", "site"]

pytestmark = pytest.mark.training


def spoil(patch: pytest.MonkeyPatch, steps: set[int], factor: float) -> None:
    """Multiply the loss of some steps."""
    true_step, true_loss = loop._step, loop._loss_sum
    now = -1

    def step(made: loop.Loop, batches: Any, progress: Progress, *, labels: int) -> Any:
        nonlocal now
        now = progress.step
        return true_step(made, batches, progress, labels=labels)

    def spoilt(made: loop.Loop, batch: Any) -> torch.Tensor:
        return true_loss(made, batch) * (factor if now in steps else 1.0)

    patch.setattr(loop, "_step", step)
    patch.setattr(loop, "_loss_sum", spoilt)


# --- what is wrong -------------------------------------------------------------------------------


def made_of(*losses: float, skipped: tuple[int, ...] = ()) -> Progress:
    return Progress(
        step=len(losses), losses=losses, grad_norms=(1.0,) * len(losses), skipped=skipped
    )


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_wrong_from_the_first_step(loss: float) -> None:
    assert Guard(spike_factor=None, rollback_after=3).is_wrong(Progress(), loss)


def test_a_loss_is_compared_with_the_median_of_those_that_were_applied() -> None:
    guard = Guard(spike_factor=3.0, rollback_after=3)
    calm = made_of(*[2.0] * 16)
    assert not guard.is_wrong(calm, 6.0)
    assert guard.is_wrong(calm, 6.1)
    spiked = made_of(*[2.0] * 16, *[50.0] * 20, skipped=tuple(range(16, 36)))
    assert guard.is_wrong(spiked, 6.1), "spikes that were left out are no measure"


def test_the_first_steps_of_a_new_model_are_compared_with_nothing() -> None:
    assert not Guard(spike_factor=3.0, rollback_after=3).is_wrong(made_of(*[2.0] * 15), 100.0)


def test_weights_go_back_after_each_so_many_wrong_steps_in_a_row() -> None:
    guard = Guard(spike_factor=None, rollback_after=3)
    losses = [1.0] * 9
    wrong = {(): False, (7, 8): False, (6, 7, 8): True, (2, 3, 4): False, (6, 7): False}
    wrong |= {tuple(range(5, 9)): False, tuple(range(3, 9)): True}
    for skipped, goes in wrong.items():
        assert guard.must_go_back(made_of(*losses, skipped=skipped)) is goes, skipped


# --- what becomes of it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "zero_stage"),
    [
        ("float32", 0),
        pytest.param("float32", 1, marks=pytest.mark.soak),
        ("float32", 2),
        ("float32", 3),
        pytest.param("bfloat16", 1, marks=pytest.mark.soak),
        ("bfloat16", 2),
        ("bfloat16", 3),
    ],
)
def test_a_wrong_step_changes_neither_weights_nor_moments(
    run: Run, dtype: str, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(SHORT, dtype=dtype, zero_stage=zero_stage)
    spoil(monkeypatch, {6}, float("nan"))
    listener = Listener(save_at={6, 7}, stop_at=8)
    with pytest.raises(Stopped):
        run.train(stage, listener)
    assert run.steps() == [6, 7]
    before, after = (state_of(run, name) for name in checkpoint._complete(run.home)[::-1])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert listener.heard[-1].skipped == 1
    progress = run.train(stage)
    assert (progress.skipped, progress.updates) == ((6,), STEPS - 1)
    assert progress.losses[-1] < progress.losses[0], "the steps after it learn"


def test_a_step_far_above_the_last_ones_is_left_out(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {18}, 100.0)
    progress = run.train(replace(SHORT, max_steps=20, spike_factor=3.0))
    assert (progress.skipped, progress.rollbacks) == ((18,), ())


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_several_wrong_steps_in_a_row_bring_back_the_last_checkpoint_and_the_data_goes_on(
    run: Run, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(SHORT, zero_stage=zero_stage)
    with pytest.raises(Stopped):
        run.train(stage, Listener(stop_at=6))
    saved = state_of(run)
    spoil(monkeypatch, {8, 9, 10}, float("nan"))
    run.train(stage, Listener(save_at={11}))
    assert run.steps() == [11, 12]
    at_11, _ = (state_of(run, name) for name in checkpoint._complete(run.home)[::-1])
    assert all(torch.equal(saved[name], at_11[name]) for name in saved)
    progress = checkpoint.newest(run.home).progress
    assert progress.rollbacks == (RollBack(at=11, to=5),)
    assert (progress.skipped, progress.updates) == ((8, 9, 10), 6)


@pytest.mark.soak
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_goes_wrong_on_one_rank_is_wrong_on_all(
    tmp_path: Path, tiny_model: Path, zero_stage: int
) -> None:
    site = make_site(tmp_path, tiny_model / "tokenizer.json")
    stage = replace(SHORT, zero_stage=zero_stage, micro_batch=2)
    made = run_phase(Phase(site, "one", stage, 2, None, spoil=(1, 6, math.nan)))
    assert (made.skipped, made.updates) == ((6,), STEPS - 1)
    assert made.losses[-1] < made.losses[0]


def test_before_the_first_checkpoint_wrong_steps_are_left_out_for_a_while(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, set(range(8)), float("nan"))
    progress = run.train(replace(SHORT, save_every_steps=50))
    assert (progress.skipped, progress.rollbacks) == (tuple(range(8)), ())


def test_weights_go_back_to_the_newest_checkpoints_and_to_no_older_ones(run: Run) -> None:
    run.train(replace(SHORT, save_every_steps=3, held_out_every_steps=3))
    made = run.loop(SHORT, Listener())
    assert len(run.steps()) >= checkpoint.KEEP
    newest, before = (made.checkpoints.restore(skip=n, among=checkpoint.KEEP) for n in (0, 1))
    assert newest is not None and before is not None and newest.step > before.step
    assert made.checkpoints.restore(skip=2, among=checkpoint.KEEP) is None


def test_a_step_that_is_saved_twice_takes_no_place_of_the_one_before(run: Run) -> None:
    run.train(SHORT)
    made = run.loop(SHORT, Listener())
    progress = made.checkpoints.resume()
    for _ in range(3):
        made.checkpoints.begin(progress)
    made.checkpoints.finish()
    assert sorted(run.steps()) == [10, 12]


def test_the_step_that_is_exported_is_the_one_whose_weights_the_model_has(run: Run) -> None:
    rolled_back = Progress(step=9, rollbacks=(RollBack(at=9, to=5),))
    loop_, job = run.loop(SHORT, Listener()), run.job(SHORT)
    assert worker._step_to_export(job, loop_, rolled_back) == 5
    assert worker._step_to_export(job, loop_, replace(rolled_back, step=10)) == 10


def test_a_look_that_is_no_number_is_never_the_best() -> None:
    looks = (HeldOut(step=1, loss=math.nan), HeldOut(step=2, loss=0.5), HeldOut(step=3, loss=0.5))
    assert loop.least(looks).step == 3
    assert loop.least(looks[:1]).step == 1


def test_losses_that_are_no_numbers_end_no_run_when_its_artifact_is_written(run: Run) -> None:
    looks = (HeldOut(step=1, loss=math.nan), HeldOut(step=2, loss=0.5))
    progress = Progress(step=2, losses=(math.nan, 1.0), grad_norms=(math.inf, 1.0), held_out=looks)
    facts = launch._facts(run.job(SHORT), Outcome(progress=progress), seconds=1.0)
    json.dumps(facts, allow_nan=False)
    assert facts["losses"] == [None, 1.0]
    assert facts["held_out"] == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_when_earlier_weights_go_wrong_too_the_run_ends_and_keeps_its_checkpoints(run: Run) -> None:
    wild = replace(SHORT, learning_rate=1e30, clip_norm=None, save_every_steps=1, epochs=3.0)
    with pytest.raises(TrainingDiverged, match=r"no earlier weights left .* Lower learning_rate"):
        run.train(wild)
    assert run.steps()
