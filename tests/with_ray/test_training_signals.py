# SPDX-License-Identifier: Apache-2.0
"""Signals to the driver of a training on a real Ray cluster, and what it says when workers fail."""

import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.storage import Storage
from sg4v_ray.training.config import StageConfig
from tests.with_ray.training_driver import newest_step, start_driver, training_workers, wait_for
from tests.with_ray.training_site import DATASET, STAGE, Site, make_site

pytestmark = [
    pytest.mark.training,
    pytest.mark.soak,
    pytest.mark.usefixtures("ray_cluster"),
]
LONG = replace(STAGE, epochs=25.0, save_every_steps=10_000)
"""200 steps and no checkpoint but the last, if nothing asks for one."""
STEPS = 200


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Site:
    return make_site(tmp_path_factory.mktemp("signals"), tiny_model / "tokenizer.json")


def _job(site: Site, ref: Ref, stage: StageConfig = LONG, **where: Any) -> dict[str, Any]:
    return {
        "config": stage,
        "start": site.fresh(),
        "dataset": DATASET,
        "out": ref,
        "where": replace(site.where(), **where),
    }


def _ended(driver: "subprocess.Popen[bytes]", folder: Path) -> str:
    """Return what a driver printed, when it has ended; its workers are gone then too."""
    driver.wait()
    assert training_workers() == []
    return (folder / "said").read_text()


def _has_begun(home: Storage) -> bool:
    return any(path.endswith("/begun") for path in home.list("signals"))


@pytest.mark.timeout(1500)
def test_sigusr1_saves_and_goes_on_and_sigterm_saves_and_stops_without_a_trace_in_the_weights(
    site: Site, tmp_path: Path
) -> None:
    undisturbed = site.run("undisturbed", LONG)
    ref = Ref(name="signalled")
    home = site.storage.sub(ref.path)
    driver = start_driver(_job(site, ref), tmp_path)
    running = lambda: driver.poll() is None  # noqa: E731
    wait_for(lambda: _has_begun(home), still=running)

    driver.send_signal(signal.SIGUSR1)
    wait_for(lambda: newest_step(home) > 0, still=running)
    saved = newest_step(home)
    driver.send_signal(signal.SIGTERM)
    said = _ended(driver, tmp_path)
    assert driver.returncode == 128 + signal.SIGTERM
    stopped = newest_step(home)
    assert f"stopped after step {stopped} of {STEPS}, saved; run the same command" in said
    assert "Traceback" not in said
    assert 0 < saved < stopped < STEPS

    finished = site.run("signalled", LONG)  # no wait for a lease: the driver gave it back
    assert finished.metrics["resumed_at"] == [stopped]
    assert finished.metrics["losses"] == undisturbed.metrics["losses"]
    expected, got = site.weights("undisturbed"), site.weights("signalled")
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert not (site.root / ref.path / "signals").exists()


def test_sigterm_before_a_worker_trains_ends_the_driver_at_once(site: Site, tmp_path: Path) -> None:
    ref = Ref(name="early")
    home = site.storage.sub(ref.path)
    driver = start_driver(_job(site, ref), tmp_path)
    wait_for(lambda: bool(training_workers()), still=lambda: driver.poll() is None)
    assert not _has_begun(home)
    driver.send_signal(signal.SIGTERM)
    said = _ended(driver, tmp_path)
    assert "stopped while no worker trained" in said
    assert "Traceback" not in said
    assert driver.returncode == 128 + signal.SIGTERM
    assert newest_step(home) == 0


def test_ctrl_c_ends_a_training_as_it_ends_every_job(site: Site, tmp_path: Path) -> None:
    ref = Ref(name="interrupted")
    home = site.storage.sub(ref.path)
    driver = start_driver(_job(site, ref), tmp_path)
    wait_for(lambda: _has_begun(home), still=lambda: driver.poll() is None)
    driver.send_signal(signal.SIGINT)
    said = _ended(driver, tmp_path)
    assert "run the same command again to resume" in said
    assert driver.returncode == 128 + signal.SIGINT


def test_workers_that_fail_too_often_end_the_run_with_what_to_do_next(
    site: Site, tmp_path: Path
) -> None:
    ref = Ref(name="lost")
    home = site.storage.sub(ref.path)
    job = _job(site, ref, replace(LONG, save_every_steps=1), max_restarts=0)
    driver = start_driver(job, tmp_path)
    wait_for(lambda: newest_step(home) > 0, still=lambda: driver.poll() is None)
    training_workers()[0].kill()
    said = _ended(driver, tmp_path)
    assert driver.returncode == 1
    assert "WorkersLost: training workers failed more than --where.max-restarts (0) times" in said
    assert "mend the cause and run the same command" in said
    assert "Traceback" not in said
