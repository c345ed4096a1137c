# SPDX-License-Identifier: Apache-2.0
"""The cause of death of a restarted actor, with real deaths on a cluster of local processes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from sg4v_ray.exactly_once.deaths import cause_of_death
from sg4v_ray.exactly_once.poison import DeathCause, Life
from tests.waiting import eventually

PREEMPTION = 2  # autoscaler.proto, DRAIN_NODE_REASON_PREEMPTION
CHUNK_BYTES, MOST_BYTES = 64 << 20, 8 << 30


# --- in the driver's process ---------------------------------------------------------------------


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)
class _Engine:
    """Dies on request; `cause` asks for the cause of an earlier death, as its next life does."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self._life = Life(context.get_worker_id(), context.get_node_id())

    def life(self) -> tuple[Life, int]:
        return self._life, os.getpid()

    def cause(self, life: Life) -> tuple[DeathCause, float]:
        began_s = time.monotonic()
        return cause_of_death(*life), time.monotonic() - began_s

    def die(self, how: str) -> None:
        if how == "os._exit":
            os._exit(1)
        if how == "segfault":
            signal.raise_signal(signal.SIGSEGV)
        if how == "out of memory":
            self._eaten = []
            for _ in range(MOST_BYTES // CHUNK_BYTES):
                self._eaten.append(b"x" * CHUNK_BYTES)
                threading.Event().wait(0.02)  # the monitor looks every 0.1 s
        sys.exit(0 if how == "sys.exit(0)" else 1)


class _Site:
    """A head for the driver alone, one node for an engine, no dashboard."""

    cluster: Cluster
    engine: Any


def start() -> None:
    _Site.cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    _Site.cluster.add_node(num_cpus=1)
    ray.init(address=_Site.cluster.address, log_to_driver=False)
    _Site.engine = _Engine.remote()


def stop() -> None:
    ray.shutdown()
    _Site.cluster.shutdown()


def kill_engine(how: str) -> tuple[DeathCause, float]:
    """End the engine's process; return the cause that the next life finds, and its seconds."""
    life, pid = ray.get(_Site.engine.life.remote())
    if how == "ray.kill":
        ray.kill(_Site.engine, no_restart=False)
    elif how.startswith("SIG"):
        os.kill(pid, signal.Signals[how])
        # A call that arrives meanwhile makes a SIGTERM look like a crash.
        eventually(lambda: not psutil.pid_exists(pid))
    else:
        _Site.engine.die.remote(how)
    next_life(life)
    return ray.get(_Site.engine.cause.remote(life))


def end_engine(how: str) -> DeathCause:
    """End an actor for good; return the cause that the driver finds."""
    engine = _Engine.options(num_cpus=0).remote()
    life, _ = ray.get(engine.life.remote())
    if how == "ray.kill":
        ray.kill(engine)
    elif how == "sys.exit(0)":
        engine.die.remote(how)
    del engine
    return cause_of_death(*life)


def ask_without_record() -> list[DeathCause]:
    life, _ = ray.get(_Site.engine.life.remote())
    never = Life("ab" * 28, life.node_id)
    return [cause_of_death(*one, wait_s=0.3) for one in (life, never)]


def lose_node(how: str) -> tuple[DeathCause, float, DeathCause]:
    """Lose the engine's node; return the cause that the next life finds, its seconds, the driver's.

    The next life runs on another node.
    """
    life, pid = ray.get(_Site.engine.life.remote())
    other = _Site.cluster.add_node(num_cpus=1)
    (node,) = (one for one in _Site.cluster.worker_nodes if one.node_id == life.node_id)
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    if how == "shut down":
        raylet.terminate()
    if how == "drained":
        deadline_ms = int((time.time() + 60) * 1000)
        gcs = GcsClient(address=_Site.cluster.gcs_address)
        assert gcs.drain_node(life.node_id, PREEMPTION, "preempted", deadline_ms)[0]
        os.kill(pid, signal.SIGKILL)
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
        threading.Event().wait(0.05)  # the raylet reports the death of its worker
        raylet.kill()
    assert next_life(life).node_id == other.node_id
    cause, took_s = ray.get(_Site.engine.cause.remote(life))
    return cause, took_s, cause_of_death(*life)


def next_life(life: Life) -> Life:
    """Wait for the life of the engine after `life`."""
    found: list[Life] = []

    def has_restarted() -> bool:
        try:
            found[:] = [ray.get(_Site.engine.life.remote(), timeout=10)[0]]
        except ray.exceptions.RayActorError:
            return False
        return found != [life]

    eventually(has_restarted, within_s=60)
    return found[0]


# --- in pytest's process, which may have a cluster of other tests --------------------------------


@contextmanager
def driver_process() -> Iterator[Callable[..., Any]]:
    """Start a process with a driver and a cluster; yields a function that calls others in it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:

        def call(function: Callable[..., Any], *args: str) -> Any:
            return pool.submit(function, *args).result(timeout=120)

        call(start)
        yield call
        call(stop)


@pytest.fixture(scope="module")
def driver() -> Iterator[Callable[..., Any]]:
    with driver_process() as call:
        yield call


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("os._exit", DeathCause.CRASHED),
        ("segfault", DeathCause.CRASHED),
        ("sys.exit(1)", DeathCause.CRASHED),
        # It looks like a crash; bisection clears its rows.
        ("SIGKILL", DeathCause.CRASHED),
        ("SIGTERM", DeathCause.UNKNOWN),
        ("ray.kill", DeathCause.STOPPED),
    ],
)
def test_the_next_life_finds_the_cause(
    driver: Callable[..., Any], how: str, cause: DeathCause
) -> None:
    found, took_s = driver(kill_engine, how)
    assert found is cause
    assert took_s < 0.9, "the record is there, and the node is that of the asking process"


@pytest.mark.parametrize("how", ["sys.exit(0)", "ray.kill", "no reference"])
def test_an_intended_end_is_no_crash(driver: Callable[..., Any], how: str) -> None:
    assert driver(end_engine, how) is DeathCause.STOPPED


def test_without_a_record_the_cause_is_unknown(driver: Callable[..., Any]) -> None:
    assert driver(ask_without_record) == [DeathCause.UNKNOWN] * 2


@pytest.mark.parametrize("how", ["shut down", "drained", "killed"])
def test_a_lost_node_is_no_crash(driver: Callable[..., Any], how: str) -> None:
    by_next_life, took_s, by_driver = driver(lose_node, how)
    assert by_next_life is by_driver is DeathCause.NODE_LOST
    assert took_s < 6, "the GCS needs 13 s"


@pytest.mark.soak
def test_the_memory_monitor_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + MOST_BYTES / 4) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    with driver_process() as driver:
        found, _ = driver(kill_engine, "out of memory")
        assert found is DeathCause.MEMORY_MONITOR
