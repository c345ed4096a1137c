# SPDX-License-Identifier: Apache-2.0
"""Write tasks of an earlier run that outlive it for a moment."""

import json
import logging
import threading
import uuid
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sg4v_ray.core.storage import Storage

_log = logging.getLogger(__name__)

MARK: Final = "SG4V_WRITER"
"""Environment variable of a run's write tasks, with the run's own value."""
_NOTE: Final = "writer.json"


def mark_writers(home: Storage) -> str:
    """Note a new run's mark in `home` and return it, for the environment of its write tasks."""
    mark = uuid.uuid4().hex
    home.put(_NOTE, json.dumps({"mark": mark}).encode())
    return mark


def wait_for_old_writers(home: Storage) -> None:
    """Wait until no write task of an earlier run is alive on any node of this cluster.

    A killed driver's tasks live a moment longer than it does. One that finished its block after
    we had read the notes would leave every row of that block twice.
    """
    if not home.exists(_NOTE):
        return
    mark = json.loads(home.get(_NOTE))["mark"]
    pause = threading.Event()
    while _writes_somewhere(mark):
        _log.info("waiting for write tasks of the previous run to end")
        pause.wait(0.5)


def _writes_somewhere(mark: str) -> bool:
    """Ask every node; one that dies meanwhile is asked again until the cluster knows it is gone."""
    asked = [_alive_on(node, mark) for node in ray.nodes() if node["Alive"]]
    try:
        return any(ray.get(asked))
    except (TaskUnschedulableError, WorkerCrashedError, NodeDiedError):
        return True


def _alive_on(node: dict[str, Any], mark: str) -> "ray.ObjectRef[bool]":
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return _marked_process.options(scheduling_strategy=strategy).remote(mark)


@ray.remote(num_cpus=0)
def _marked_process(mark: str) -> bool:
    """Say whether a process of this machine carries the mark in its environment and works.

    A worker whose tasks have ended waits for others of the same environment under another name.
    """
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            is_idle = (entry / "cmdline").read_bytes().startswith(b"ray::IDLE")
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted in environment and not is_idle:
            return True
    return False
