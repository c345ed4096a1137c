# SPDX-License-Identifier: Apache-2.0
"""What comes in is what the files hold, and what goes out are the weights that were asked for."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sg4v_ray.core.errors import StorageError
from sg4v_ray.core.storage import Storage
from sg4v_ray.model.weights import load
from sg4v_ray.training import checkpoint, loop, worker
from sg4v_ray.training.checkpoint import CheckpointsDamaged
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.loop import train
from sg4v_ray.training.progress import Progress
from tests.with_ray.test_training_guard import spoil
from tests.with_ray.test_training_loop import (
    SHORT,
    STEPS,
    Listener,
    Run,
    run,
    site,
    state_of,
)
from tests.with_ray.training_site import Site

__all__ = ["run", "site"]

pytestmark = pytest.mark.training

BEST = replace(SHORT, held_out_every_steps=3, export_checkpoint="best")


def look_and_export(run: Run, folder: Path, stage: StageConfig, losses: list[float]) -> int:
    """Train with these held-out losses and export; return the step that was exported."""
    looks = iter(losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_held_out_loss", lambda _: next(looks))
        made = run.loop(stage, Listener())
        progress = train(made)
    step = worker._step_to_export(run.job(stage), made, progress)
    worker._export(run.job(stage), run.home, folder, run.model, made.engine)
    return step


def name_of(run: Run, step: int) -> str:
    """Return the name of the checkpoint of a step."""
    (folder,) = Path(run.home.root, checkpoint.FOLDER).glob(f"{step:08d}-*")
    return folder.name


def test_weights_after_a_wrong_step_are_no_candidate(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {5}, float("nan"))  # the step before the look at 6
    assert look_and_export(run, tmp_path, BEST, [3.0, 1.0, 2.0]) == 9, "looks at 3, 9 and 12"


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_weights_with_the_least_held_out_loss_are_those_that_are_exported(
    run: Run, tmp_path: Path, zero_stage: int
) -> None:
    stage = replace(BEST, zero_stage=zero_stage)
    assert look_and_export(run, tmp_path, stage, [3.0, 1.0, 2.0, 4.0]) == 6
    assert run.steps() == [6, 10, 12], "a look that is the best so far is saved"
    exported = load(tmp_path, dtype="float32").state_dict()
    best, last = (state_of(run, name_of(run, step)) for step in (6, 12))
    trained = [name for name in exported if f"weight/{name}" in best]
    assert trained
    for name in trained:
        assert torch.equal(exported[name].flatten(), best[f"weight/{name}"])
    assert not all(torch.equal(exported[one].flatten(), last[f"weight/{one}"]) for one in trained)


def test_when_the_last_step_is_the_best_nothing_is_read_to_export_it(
    run: Run, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(checkpoint.Checkpoints, "restore_step")
        assert look_and_export(run, tmp_path, BEST, [3.0, 1.0, 2.0, 1.0]) == STEPS
    exported, expected = load(tmp_path, dtype="float32").state_dict(), run.model.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in exported.items())


def test_a_damaged_best_checkpoint_is_an_error_and_no_other_is_exported(
    run: Run, tmp_path: Path
) -> None:
    look_and_export(run, tmp_path, BEST, [3.0, 1.0, 2.0, 4.0])
    run.home.put(f"{checkpoint.FOLDER}/{name_of(run, 6)}/rank-00000.safetensors", b"damaged")
    with pytest.raises(
        CheckpointsDamaged, match=r"best checkpoint, of step 6, .* was changed .* version"
    ):
        look_and_export(run, tmp_path, BEST, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharding_a_model_from_files_changes_no_bit_of_it(
    run: Run, site: Site, dtype: str, tmp_path: Path
) -> None:
    source = site.commit_model(f"source-{dtype}", dtype="float32")
    job = replace(run.job(replace(SHORT, zero_stage=3, dtype=dtype)), start=source)
    model = worker.prepare(job, run.home, tmp_path)
    made = worker.make_loop(job, run.home, tmp_path, model, Listener())
    found = made.engine._zero3_consolidated_16bit_state_dict()
    expected = load(source.localise(), dtype=dtype).state_dict()
    assert set(found) == set(expected)
    for name, one in expected.items():
        assert found[name].dtype == one.dtype
        assert torch.equal(found[name], one)


def test_a_checkpoint_for_which_the_temporary_disk_has_no_room_is_not_begun(run: Run) -> None:
    made = run.loop(SHORT, Listener())
    bucket = checkpoint.Checkpoints(Storage("s3://never-asked/run"), made.engine, attempt=0)
    usage = shutil.disk_usage("/")._replace(free=200_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StorageError, match=r"has 0.0002 GB free .* needs .* set TMPDIR"):
            bucket.begin(Progress(step=1))
    bucket.finish()  # nothing was begun
