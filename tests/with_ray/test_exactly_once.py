# SPDX-License-Identifier: Apache-2.0
"""Every id of the index exactly once in the output, whatever was killed on the way.

The drivers are real processes, each with a Ray of its own or on a cluster of several nodes, and
everything is killed with SIGKILL.
"""

import os
import random
import signal
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from sg4v_ray.core.artifact import is_finished
from sg4v_ray.recipes.easy_vqa import CAPTIONS
from tests.with_ray.caption_site import (
    KILLED_AT_COMMIT,
    Driver,
    kill,
    make_site,
    processes,
)

pytestmark = pytest.mark.timeout(2400)

TITLES = {"engine": "MapBatches(Generate)", "decode": "ray::decode"}
KINDS = ("decode", "node", "driver", "engine")


class Nodes:
    """A cluster of a head that runs drivers only, and two nodes that come and go."""

    def __init__(self) -> None:
        quiet = {"include_dashboard": False}
        # As jobs._cli.start_ray: on a small machine each task would start a process anew.
        patient = {"_system_config": {"idle_worker_killing_time_threshold_ms": 60_000}}
        head = {"num_cpus": 0, **quiet, **patient}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(num_cpus=2) for _ in range(2)]
        self.address = self._cluster.address

    def kill_one(self, rng: random.Random) -> None:
        """Kill a node with all its processes, and bring another."""
        node = self._nodes.pop(rng.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=2))

    def stop(self) -> None:
        """End all processes."""
        self._cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    started.stop()


def kill_workers(title: str, driver: Driver) -> None:
    """Kill the cluster's processes that do a thing, as soon as there is one."""
    kill(driver.until(lambda: list(processes(title, os.getpid())), every_s=0.01))


@pytest.mark.parametrize(
    ("kills", "num_images"),
    # Enough that rows are left after the last kill: work goes on while workers start anew. The
    # one kill is of a driver, and of the workers of the next.
    [(1, 200), pytest.param(30, 4000, marks=pytest.mark.scale)],
)
def test_kills_of_anything_and_one_at_the_manifest_lose_and_double_nothing(
    tmp_path: Path, tiny_model: Path, nodes: Nodes, kills: int, num_images: int
) -> None:
    root = str(tmp_path / "runs")
    site = make_site(root, tmp_path, tiny_model, num_images, RAY_ADDRESS=nodes.address)
    rng = random.Random(4)
    driver = site.drive(*KILLED_AT_COMMIT)
    for kind in rng.sample(list(islice(cycle(KINDS), kills)), kills):
        target = site.committed() + rng.randint(10, 40)
        driver.until(lambda goal=target: site.committed() >= goal)
        if kind in ("driver", "decode"):
            driver.kill()
            assert not is_finished(site.storage, CAPTIONS, config={})
            driver = site.drive(*KILLED_AT_COMMIT)
            if kind == "decode":  # soon done, so at once
                kill_workers(TITLES[kind], driver)
        elif kind == "node":
            nodes.kill_one(rng)
        else:
            kill_workers(TITLES[kind], driver)
    assert driver.wait() == -signal.SIGKILL
    assert not is_finished(site.storage, CAPTIONS, config={})
    site.drive().succeed()
    site.check_exactly_once()


def test_of_two_jobs_on_one_artifact_from_two_clusters_one_goes_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 64)
    drivers = [site.drive(flags=("--engine.latency-s=0.08",)) for _ in range(2)]
    codes = [driver.wait() for driver in drivers]
    assert sorted(codes) == [0, 1]
    assert "LeaseHeld: another job" in drivers[codes.index(1)].errors
    site.check_exactly_once()


def test_a_job_that_its_user_stops_says_how_to_go_on(tmp_path: Path, tiny_model: Path) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 80)
    driver = site.drive()
    driver.until(lambda: site.committed() > 0)
    assert driver.interrupt() == 128 + signal.SIGINT
    assert driver.errors.rstrip().endswith("run the same command again to resume")
    assert "Traceback" not in driver.errors
    site.drive().succeed()
    site.check_exactly_once()


def test_a_job_that_was_overtaken_stops_and_commits_nothing(
    tmp_path: Path, tiny_model: Path
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 2000)
    driver = site.drive()
    driver.until(lambda: site.committed() > 0)
    # What a job on another machine does after this one was silent for the lease's time.
    assert site.storage.create(f"{CAPTIONS.path}/lease/000002.json", b"{}")
    assert driver.wait() == 1
    assert "LeaseLost: writer 2 took over" in driver.errors
    assert "open an issue" not in driver.errors  # Ray's, for what it takes for its own bugs
    assert not is_finished(site.storage, CAPTIONS, config={})
