# SPDX-License-Identifier: Apache-2.0
"""Training while nodes are lost and come back: fewer workers go on, more take over.

The nodes are processes of this machine (ray.cluster_utils), with a CPU for one worker each.
"""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.storage import Storage
from sg4v_ray.training import checkpoint
from sg4v_ray.training.config import StageConfig
from tests.with_ray.training_driver import newest_step, start_driver, wait_for
from tests.with_ray.training_site import DATASET, STAGE, Site, make_site

pytestmark = [pytest.mark.training, pytest.mark.soak, pytest.mark.timeout(1500)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head for the driver alone; tests add nodes for workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Site:
    return make_site(tmp_path_factory.mktemp("elastic"), tiny_model / "tokenizer.json")


def _job(site: Site, ref: Ref, stage: StageConfig, **where: Any) -> dict[str, Any]:
    return {
        "config": stage,
        "start": site.fresh(),
        "dataset": DATASET,
        "out": ref,
        "where": replace(site.where(), worker_cpus=1.0, **where),
    }


def _num_workers(home: Storage) -> int:
    """Return how many workers wrote the newest checkpoint."""
    found = checkpoint.newest(home)
    return len(found.digests) if found else 0


def test_a_run_that_loses_a_node_goes_on_with_one_worker_and_learns_the_same(
    site: Site, tmp_path: Path, cluster: Cluster
) -> None:
    stage = replace(STAGE, epochs=15.0, learning_rate=1e-3)  # 120 steps
    _, lost = (cluster.add_node(num_cpus=1) for _ in range(2))
    cluster.wait_for_nodes()
    undisturbed = Ref(name="undisturbed")
    reference = start_driver(_job(site, undisturbed, stage), tmp_path, address=cluster.address)
    assert reference.wait() == 0, (tmp_path / "said").read_text()

    ref = Ref(name="shrunk")
    home = site.storage.sub(ref.path)
    job = _job(site, ref, stage, min_train_workers=1, max_restarts=1)
    driver = start_driver(job, tmp_path, address=cluster.address)
    wait_for(lambda: newest_step(home) >= 10, still=lambda: driver.poll() is None)
    cluster.remove_node(lost, allow_graceful=False)
    assert driver.wait() == 0, (tmp_path / "said").read_text()
    expected, got = find(site.storage, undisturbed), find(site.storage, ref)
    assert len(got.metrics["resumed_at"]) == 1
    for name in expected.counts.keys() - {"tokens"}:  # those of the rows that weigh nothing differ
        assert got.counts[name] == expected.counts[name], name
    assert got.metrics["losses"] == pytest.approx(expected.metrics["losses"], rel=1e-3, abs=1e-3)


def test_a_run_grows_when_a_node_comes_and_saves_before(
    site: Site, tmp_path: Path, cluster: Cluster
) -> None:
    stage = replace(STAGE, epochs=10_000.0, save_every_steps=1_000_000)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ref = Ref(name="grown")
    home = site.storage.sub(ref.path)
    job = _job(site, ref, stage, min_train_workers=1, max_restarts=0)
    driver = start_driver(job, tmp_path, address=cluster.address, resize_every_s=5.0)
    running = lambda: driver.poll() is None  # noqa: E731
    wait_for(lambda: any(one.endswith("/begun") for one in home.list("signals")), still=running)
    assert newest_step(home) == 0
    cluster.add_node(num_cpus=1)
    wait_for(lambda: newest_step(home) > 0, still=running)
    assert _num_workers(home) == 1
    before = checkpoint.newest(home).progress

    def saved_again() -> bool:
        driver.send_signal(signal.SIGUSR1)
        return _num_workers(home) == 2

    wait_for(saved_again, still=running)
    driver.send_signal(signal.SIGTERM)
    driver.wait()
    assert "stopped after step" in (tmp_path / "said").read_text()
    after = checkpoint.newest(home).progress
    # A signal may have made the one worker save once more before it was stopped.
    [resumed] = after.resumed_at
    assert resumed >= before.step > 0
    assert after.losses[: before.step] == before.losses


def test_a_node_that_will_be_taken_away_makes_all_workers_save(
    site: Site, tmp_path: Path, cluster: Cluster
) -> None:
    stage = replace(STAGE, epochs=10_000.0, save_every_steps=1_000_000)
    _, going = (cluster.add_node(num_cpus=1) for _ in range(2))
    cluster.wait_for_nodes()
    ref = Ref(name="preempted")
    home = site.storage.sub(ref.path)
    driver = start_driver(_job(site, ref, stage), tmp_path, address=cluster.address)
    running = lambda: driver.poll() is None  # noqa: E731
    wait_for(lambda: any(one.endswith("/begun") for one in home.list("signals")), still=running)
    assert newest_step(home) == 0
    # What the autoscaler calls when a cloud says that it takes a machine back.
    drain = ["ray", "drain-node", "--address", cluster.address, "--node-id", going.node_id]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
    how = [*drain, *why, "--deadline-remaining-seconds", "300"]
    subprocess.run([str(Path(sys.executable).parent / how[0]), *how[1:]], check=True)
    wait_for(lambda: newest_step(home) > 0, still=running)
    assert _num_workers(home) == 2
    driver.kill()
    driver.wait()
