# SPDX-License-Identifier: Apache-2.0
"""Ray's own autoscaler brings nodes while actors wait and takes them back when they are idle.

The nodes are processes of this machine (Ray's fake multi-node provider), each with a logical GPU;
what decides about them is the autoscaler that decides on a cloud.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.with_ray.caption_site import kill, make_site

pytestmark = [pytest.mark.scale, pytest.mark.timeout(1500)]

MOST_NODES = 4
PORT = 6379
"""Fake nodes look for their head here, whatever its port is."""
CLUSTER = {
    "cluster_name": "fake",
    "max_workers": MOST_NODES,
    "upscaling_speed": 10,
    # With 12 s nodes were taken away before their actors had started.
    "idle_timeout_minutes": 0.75,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,  # nothing is installed on a node by ssh
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "engine_node": {
            "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 200_000_000},
            "node_config": {},
            "min_workers": 1,
            "max_workers": MOST_NODES,
        },
    },
    "head_node_type": "ray.head.default",
    "auth": {"ssh_user": "nobody"},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "setup_commands": [],
    "initialization_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


class AutoscalingCluster:
    """A head with an autoscaler, in a process group that ends with the test."""

    address = f"127.0.0.1:{PORT}"

    def __init__(self, folder: Path) -> None:
        config = folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(CLUSTER))
        ray = str(Path(sys.executable).with_name("ray"))
        start = [ray, "start", "--head", f"--port={PORT}", f"--autoscaling-config={config}"]
        quiet = ["--num-cpus=0", "--include-dashboard=false", "--block"]
        environment = os.environ | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_ENABLE_AUTOSCALER_V2": "0",
            "RAY_AUTH_MODE": "disabled",  # the fake provider gives its nodes no token
        }
        self._log = (folder / "head.log").open("w")
        self._head = subprocess.Popen(
            [*start, *quiet],
            env=environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._ray = ray

    def raylets(self) -> list[int]:
        """Return the processes of living engine nodes."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if "core/src/ray/raylet/raylet" in line and "GPU,1" in line:
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """End the head and all nodes."""
        kill(self.raylets())
        os.killpg(self._head.pid, 9)
        self._head.wait()
        self._log.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[AutoscalingCluster]:
    started = AutoscalingCluster(tmp_path)
    yield started
    started.stop()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        pause.wait(0.5)


def test_the_pool_grows_under_load_survives_a_lost_node_and_shrinks_when_idle(
    tmp_path: Path, tiny_model: Path, cluster: AutoscalingCluster
) -> None:
    site = make_site(
        str(tmp_path / "runs"), tmp_path, tiny_model, 4000, RAY_ADDRESS=cluster.address
    )
    wait_for(lambda: len(cluster.raylets()) == 1, 120, "the first node")
    flags = (f"--where.max-actors={MOST_NODES}", "--where.engine-gpus=1", "--where.engine-cpus=1")
    driver = site.drive(flags=flags)
    driver.until(lambda: len(cluster.raylets()) == MOST_NODES)
    goal = site.committed() + 100
    driver.until(lambda: site.committed() >= goal)
    kill([random.Random(4).choice(cluster.raylets())])
    driver.succeed()
    site.check_exactly_once()
    wait_for(lambda: len(cluster.raylets()) == 1, 300, "back to one node")
