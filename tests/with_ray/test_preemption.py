# SPDX-License-Identifier: Apache-2.0
"""The loss of a node blames no row; a row that crashes the engine is found among 128.

The figures of crashes are those that the crash tracker logs in the driver's output.
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image
from ray._private.node import Node
from ray.cluster_utils import Cluster

from sg4v_ray.core.artifact import find
from sg4v_ray.core.records import CaptionRow, ImageRow
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.rows import ROWS, read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.monitor import STATUS
from sg4v_ray.exactly_once.poison import REJECT_DETAIL
from sg4v_ray.recipes.easy_vqa import CAPTIONS
from sg4v_ray.sources import shapes
from tests.with_ray.caption_site import (
    CAPTIONER,
    Driver,
    Site,
    finish,
    make_site,
    processes,
    write_index,
)

pytestmark = [pytest.mark.scale, pytest.mark.timeout(1200)]

ENGINE = "MapBatches(Generate)"
IN_FLIGHT = 128
ROWS_PER_TASK = 16
CAPACITY = (IN_FLIGHT + ROWS_PER_TASK) // 2
"""Of twice as many rows in flight, less than one task is missing at any time."""
ROWS_PER_PART = 64
FLAGS = (
    f"--engine.capacity={CAPACITY}",
    "--engine.latency-s=0.2",  # 10 s for a part
    f"--batching.rows-per-part={ROWS_PER_PART}",
    f"--batching.rows-per-task={ROWS_PER_TASK}",
)
POISON = 251


class Nodes:
    """A cluster of a head that runs drivers only, and two nodes."""

    def __init__(self) -> None:
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": {"idle_worker_killing_time_threshold_ms": 60_000},
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(num_cpus=2) for _ in range(2)]
        self.address = self._cluster.address

    def lose_the_engines(self, *, has_notice: bool) -> None:
        """Remove the node with the engine: SIGTERM to its raylet, or SIGKILL to all processes."""
        (node,) = (one for one in self._nodes if list(processes(ENGINE, _raylet(one))))
        self._nodes.remove(node)
        below = psutil.Process(_raylet(node)).children(recursive=True)
        self._cluster.remove_node(node, allow_graceful=has_notice)
        for process in below:
            if process.is_running():
                process.kill()

    def stop(self) -> None:
        """End all processes."""
        self._cluster.shutdown()


def _raylet(node: Node) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    started.stop()


def num_parts(site: Site) -> int:
    names = site.storage.sub(f"{CAPTIONS.path}/{ROWS}/attempt-0001").list()
    return sum(1 for name in names if name.endswith(".parquet"))


def wait_for_a_part(driver: Driver, site: Site, before: int) -> None:
    driver.until(lambda: num_parts(site) > before)


def wait_until_all_rows_are_in_flight(driver: Driver, site: Site) -> None:
    """Wait for a status with a full engine and so many rows that wait in it that 128 are in flight.

    The status is written after a part is committed, so that the rows in the engine are new.
    """
    wait_for_a_part(driver, site, num_parts(site))
    since, status = time.time(), Path(site.storage.uri(f"{CAPTIONS.path}/{STATUS}"))
    driver.until(
        lambda: (
            status.stat().st_mtime > since
            and json.loads(status.read_text())["queue"] >= IN_FLIGHT - CAPACITY
        )
    )


def deaths(driver: Driver) -> list[tuple[int, str]]:
    """Return the number of rows inside and the cause of each death of an engine."""
    found = re.findall(r"engine \w+ died with (\d+) rows inside: (\w+)", driver.errors)
    return [(int(rows), cause) for rows, cause in found]


@pytest.mark.parametrize("has_notice", [True, False])
def test_128_rows_in_flight_at_a_preemption_are_run_again_together(
    tmp_path: Path, tiny_model: Path, nodes: Nodes, has_notice: bool
) -> None:
    root = str(tmp_path / "runs")
    site = make_site(root, tmp_path, tiny_model, 10 * ROWS_PER_PART, RAY_ADDRESS=nodes.address)
    driver = site.drive(flags=FLAGS)
    wait_until_all_rows_are_in_flight(driver, site)
    before, lost_s = num_parts(site), time.monotonic()
    nodes.lose_the_engines(has_notice=has_notice)
    wait_for_a_part(driver, site, before)
    preemption_s = time.monotonic() - lost_s
    ((inside, cause),) = deaths(driver)
    assert (inside >= IN_FLIGHT, cause) == (True, "node_lost")
    # Without a suspect no row is run alone; a suspect needs a crash or two unknown deaths.
    wait_until_all_rows_are_in_flight(driver, site)
    before, killed_s = num_parts(site), time.monotonic()
    driver.kill()
    driver = site.drive(flags=FLAGS)
    wait_for_a_part(driver, site, before)
    restart_s = time.monotonic() - killed_s
    print(
        f"\nto the next part: {preemption_s:.1f} s after the loss of the node "
        f"({'with' if has_notice else 'without'} notice), {restart_s:.1f} s after the kill of the "
        f"driver: {preemption_s / restart_s:.2f} times"
    )
    assert preemption_s < 2 * restart_s
    driver.succeed()
    assert deaths(driver) == []
    site.check_exactly_once()
    assert find(site.storage, CAPTIONS).counts["rejected"] == 0


@pytest.mark.parametrize(
    ("rows_per_task", "poisoned"),
    # The first row of a call costs most: each first half has it. It is in the last call, so that
    # the rows of the others are in the engine when it comes.
    [(128, 0), (16, 112)],
)
def test_one_row_of_128_that_kills_the_engine_is_found_within_9_restarts(
    tmp_path: Path, tiny_model: Path, rows_per_task: int, poisoned: int
) -> None:
    site = poisoned_site(tmp_path, tiny_model, poisoned)
    driver = site.drive(
        flags=(
            f"--engine.poison={POISON}",
            f"--engine.capacity={2 * IN_FLIGHT}",  # decode tasks have at most half as many rows
            "--engine.latency-s=0.1",  # longer in the engine than all rows take to get there
            f"--batching.rows-per-part={IN_FLIGHT}",
            f"--batching.rows-per-task={rows_per_task}",
        )
    )
    driver.succeed()
    found = deaths(driver)
    print(
        f"\n{rows_per_task} rows a call, rows inside at each death: {[rows for rows, _ in found]}"
    )
    # Decode tasks run in parallel: some calls may come after the last.
    assert found[0][0] >= (IN_FLIGHT if rows_per_task == IN_FLIGHT else IN_FLIGHT * 3 // 4)
    assert {cause for _, cause in found} == {"crashed"}
    assert len(found) <= 9
    site.check_exactly_once()
    (rejected,) = (row for row in read_rows(site.storage, CAPTIONS, CaptionRow) if row.reject)
    assert (rejected.id, rejected.reject) == (f"i{poisoned:04d}", Reject.CRASHES_ENGINE.value)
    assert rejected.reject_detail == REJECT_DETAIL.format(crashes=len(found))


def poisoned_site(folder: Path, model: Path, poisoned: int) -> Site:
    """Return a site of one part of 128 rows, one of which kills the fake engine."""
    shapes.draw(1).save(folder / "good.png")
    Image.new("RGB", (16, 16), (POISON,) * 3).save(folder / "poison.png")
    storage = Storage(str(folder / "runs"))
    rows = [
        ImageRow(
            id=f"i{n:04d}",
            source="drawn",
            uri=str(folder / ("poison.png" if n == poisoned else "good.png")),
            size_bytes=1,
        )
        for n in range(IN_FLIGHT)
    ]
    write_index(storage, rows)
    finish(storage, CAPTIONER, digests=storage.upload(model, f"{CAPTIONER.path}/model"))
    return Site(storage, IN_FLIGHT, folder)
