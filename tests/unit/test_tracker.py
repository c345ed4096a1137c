# SPDX-License-Identifier: Apache-2.0
"""The curves of a run are where its owner looks for them."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import Storage
from sg4v_ray.training import tracker
from sg4v_ray.training.metrics import Metrics
from sg4v_ray.training.tracker import FOLDER, check, open_tracker

pytestmark = pytest.mark.training


def metrics(step: int, loss: float, **changed: Any) -> Metrics:
    fields = {
        "step": step,
        "total_steps": 10,
        "epoch": step / 10,
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "held_out_loss": None,
        "samples_per_s": 5.0,
        "samples_per_s_per_worker": 2.5,
        "tokens_per_s": 500.0,
        "mfu": None,
        "padding_share": 0.01,
        "data_wait_share": 0.0,
        "memory_gb": 1.5,
        "eta_s": 60.0,
        "rejected": 0,
        "skipped": 0,
        "rollbacks": 0,
    }
    return Metrics(**fields | changed)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(one.step, round(one.value, 3)) for one in found.Scalars(name)]


def test_tensorboard_finds_a_run_beside_its_model(tmp_path: Path) -> None:
    home = Storage(str(tmp_path))
    drawn = open_tracker("tensorboard", home, name="vlm@v1", settings={})
    for step, loss in ((1, 3.0), (2, 2.5)):
        drawn.log(metrics(step, loss))
    drawn.close()
    assert curve(tmp_path / FOLDER, "train/loss") == [(1, 3.0), (2, 2.5)]


def test_what_is_not_known_is_not_drawn(tmp_path: Path) -> None:
    drawn = open_tracker("tensorboard", Storage(str(tmp_path)), name="vlm@v1", settings={})
    drawn.log(metrics(1, 3.0, held_out_loss=2.0))
    drawn.close()
    found = EventAccumulator(str(tmp_path / FOLDER))
    found.Reload()
    assert "train/held_out_loss" in found.Tags()["scalars"]
    assert "train/mfu" not in found.Tags()["scalars"]


def test_a_run_that_goes_on_from_a_checkpoint_draws_no_step_twice(tmp_path: Path) -> None:
    home = Storage(str(tmp_path))
    for steps in ((1, 2, 3, 4), (3, 4, 5)):  # stopped after 4, the last checkpoint was of 2
        drawn = open_tracker("tensorboard", home, name="vlm@v1", settings={})
        for step in steps:
            drawn.log(metrics(step, float(steps[0])))
        drawn.close()
    found = curve(tmp_path / FOLDER, "train/loss")
    assert found == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 3.0)]


def test_curves_in_a_bucket_are_whole_files(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "_UPLOAD_EVERY_S", 0.0)
    home = Storage("s3://sg4v-test/root/vlm/v1")
    drawn = open_tracker("tensorboard", home, name="vlm@v1", settings={})
    drawn.log(metrics(1, 3.0))
    early = {path: len(home.get(path)) for path in home.list(FOLDER)}
    assert len(early) == 1, "while the run goes on"
    drawn.log(metrics(2, 2.0))
    drawn.close()
    for path in home.list(FOLDER):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(home.get(path))
    assert curve(tmp_path / FOLDER, "train/loss") == [(1, 3.0), (2, 2.0)]


def test_weights_and_biases_gets_the_same_run_again_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        drawn = open_tracker(
            "wandb", Storage(str(tmp_path)), name="vlm@v1", settings={"learning_rate": 1e-3}
        )
        drawn.log(metrics(step, 3.0))
        drawn.close()
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert files and len({file.name for file in files}) == 1, "one id"
    said = b"".join(file.read_bytes() for file in files)
    for word in (b"vlm@v1", b"learning_rate", b"train/loss", b"train/tokens_per_s"):
        assert word in said


def test_a_run_that_is_made_anew_is_another_one(tmp_path: Path) -> None:
    first, second = Storage(str(tmp_path / "a")), Storage(str(tmp_path / "b"))
    assert tracker._id_of(first) == tracker._id_of(first) != tracker._id_of(second)
    first.delete("wandb-id")
    assert tracker._id_of(first) != tracker._id_of(second)


def test_curves_that_cannot_be_written_stop_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    drawn = open_tracker("tensorboard", Storage(str(tmp_path)), name="vlm@v1", settings={})
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
    drawn.log(metrics(1, 3.0))
    drawn.close()
    assert "curves are not written at step 1: No space left" in caplog.text


def test_a_tracker_that_is_not_installed_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb, which is not installed; pip install wandb"):
        check("wandb")
    check("tensorboard")
