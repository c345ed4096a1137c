# SPDX-License-Identifier: Apache-2.0
"""Why the previous process of a restarted Ray actor died.

Measured with Ray 2.60.0 without a dashboard (tests/with_ray/test_deaths.py); a record is there
within 30 ms.

    death                               record in the GCS's worker table
    os._exit, abort, SIGSEGV, SIGKILL   SYSTEM_ERROR, "... connection error code 2. End of file."
    sys.exit(1)                         SYSTEM_ERROR, "... Worker exits with an exit code 1."
    SIGTERM to the worker               SYSTEM_ERROR, "... The process receives a SIGTERM."; as
                                        SIGKILL if a call arrives while it ends
    an error in `__init__`              USER_ERROR
    ray.kill, no reference left         INTENDED_SYSTEM_EXIT
    sys.exit(0)                         INTENDED_USER_EXIT
    memory monitor                      NODE_OUT_OF_MEMORY
    node: SIGTERM to its raylet         none; the GCS marks the node dead within 10 ms
    node: SIGKILL of its raylet         none; the GCS marks it dead after 14 s, then restarts actors
    node: SIGKILL, the worker first     as SIGKILL; the actor restarts after 1.3 s, but the GCS
                                        marks the node dead after 13 s only

A SIGKILL of the worker alone, e.g. by the kernel's OOM killer, looks like a crash: bisection clears
its rows.
"""

import socket
import threading
import time
from typing import Any, Final

import ray

# Private: ray.util.state.get_worker(id) has the same fields, but needs a dashboard. It would
# replace both imports and `_worker_record` if it read the GCS directly.
from ray._private.state import state as _global_state
from ray.core.generated import common_pb2, gcs_pb2

from sg4v_ray.exactly_once.poison import DeathCause

_POLL_S: Final = 0.1
_CONNECT_S: Final = 3.0
_SETTLE_S: Final = 1.0
"""Between the deaths of a worker and of its raylet when a container or machine is killed."""
_BY_ITSELF: Final = ("connection error code", "exits with an exit code")
"""Parts of Ray's texts for a process that ended. Another system error is unknown."""
_BY_OTHERS: Final = "SIGTERM"
"""Part of Ray's texts for a process that got this signal, with or without an exit code."""
_OTHER_TYPES: Final = {
    common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY: DeathCause.MEMORY_MONITOR,
    common_pb2.WorkerExitType.INTENDED_SYSTEM_EXIT: DeathCause.STOPPED,
    common_pb2.WorkerExitType.INTENDED_USER_EXIT: DeathCause.STOPPED,
    common_pb2.WorkerExitType.USER_ERROR: DeathCause.CRASHED,
}


def cause_of_death(worker_id: str, node_id: str, *, wait_s: float = 5.0) -> DeathCause:
    """Return why a worker process died. Blocks; works in any process of the cluster.

    Args:
        worker_id: of the dead process, from `ray.get_runtime_context().get_worker_id()`.
        node_id: of its node, from `ray.get_runtime_context().get_node_id()`.
        wait_s: for a record of the death; without a record the cause is unknown.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        if not _is_node_up(node_id):
            return DeathCause.NODE_LOST
        record = _worker_record(worker_id)
        if record is not None and not record.is_alive:
            break
        if time.monotonic() >= deadline_s:
            return DeathCause.UNKNOWN
        threading.Event().wait(_POLL_S)
    cause = _cause(record)
    if cause in (DeathCause.CRASHED, DeathCause.UNKNOWN) and not _is_own(node_id):
        threading.Event().wait(_SETTLE_S)
        if not _is_node_up(node_id):
            return DeathCause.NODE_LOST
    return cause


def _cause(record: Any) -> DeathCause:
    other = _OTHER_TYPES.get(record.exit_type)
    if other is not None:
        return other
    detail: str = record.exit_detail
    is_crash = _BY_OTHERS not in detail and any(text in detail for text in _BY_ITSELF)
    return DeathCause.CRASHED if is_crash else DeathCause.UNKNOWN


def _is_own(node_id: str) -> bool:
    return node_id == ray.get_runtime_context().get_node_id()


def _is_node_up(node_id: str) -> bool:
    """Return whether a node is alive, is not being drained and its raylet accepts a connection.

    The connection is needed because the GCS lists a killed raylet as alive for 13 s.
    """
    node = next((one for one in ray.nodes() if one["NodeID"] == node_id), None)
    if node is None or not node["Alive"] or node_id in _draining_nodes():
        return False
    if _is_own(node_id):
        return True
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _worker_record(worker_id: str) -> Any:
    """Return the WorkerTableData of a worker, or None without one.

    Ray keeps the records of the latest dead workers only (maximum_gcs_dead_worker_cached_count).
    """
    accessor = _global_state._connect_and_get_accessor()
    found = accessor.get_worker_info(ray.WorkerID.from_hex(worker_id))
    return None if found is None else gcs_pb2.WorkerTableData.FromString(found)


def _draining_nodes() -> dict[str, int]:
    """Return the deadline of each node that is about to go, e.g. by spot preemption.

    Private: a field for it in ray.nodes() would replace this.
    """
    drained: dict[str, int] = _global_state._connect_and_get_accessor().get_draining_nodes()
    return drained
