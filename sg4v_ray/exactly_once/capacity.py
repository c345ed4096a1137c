# SPDX-License-Identifier: Apache-2.0
"""Cluster capacity: engines that fit beside the decode tasks that feed them.

Ray gives CPUs to the first request. Engines that held all CPUs would wait for rows indefinitely.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable

import ray
from ray._private import state as cluster_state

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.where import Where

_log = logging.getLogger(__name__)

_MAX_DECODE_TASKS = 8
_POLL_S = 0.5


def check_cluster_capacity(where: Where) -> None:
    """Raise ConfigError if the cluster cannot run one decode task beside the smallest pool.

    Without this check a plan that is too large waits indefinitely and reports nothing.
    """
    wait_for_nodes(lambda: _shortage(where))


def _shortage(where: Where) -> str | None:
    have = max_cluster_resources()
    if num_engines_that_fit(where, have) >= where.min_actors:
        return None
    need_cpus = where.min_actors * where.engine_cpus + where.decode_cpus
    need_gpus = where.min_actors * where.engine_gpus
    return (
        f"the cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; "
        f"{where.min_actors} engine(s) of {where.engine_cpus:g} CPUs and "
        f"{where.engine_gpus:g} GPUs and one decode task need {need_cpus:g} and "
        f"{need_gpus:g}. Lower --where.engine-cpus or --where.min-actors, or add nodes."
    )


def wait_for_nodes(shortage: Callable[[], str | None], *, wait_s: float = 60.0) -> None:
    """Wait until a cluster is large enough; in one that was started with this job, do not wait.

    A job is often submitted while the nodes of its cluster still start.

    Args:
        shortage: returns the text of the error, or None if the cluster is large enough.
        wait_s: limit in seconds.

    Raises:
        ConfigError: the cluster is too small.
    """
    started_s = time.monotonic()
    is_reported = False
    while (text := shortage()) is not None:
        if not joins_cluster() or time.monotonic() - started_s >= wait_s:
            raise ConfigError(text)
        if not is_reported:
            _log.warning("waiting up to %.0f s for nodes that start: %s", wait_s, text)
            is_reported = True
        threading.Event().wait(_POLL_S)


def joins_cluster() -> bool:
    """Return whether jobs of this process run on an existing cluster: submitted, or RAY_ADDRESS."""
    return in_ray_job() or bool(os.environ.get("RAY_ADDRESS"))


def in_ray_job() -> bool:
    """Return whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def initial_pool_size(where: Where) -> int:
    """Return how many of `max_actors` fit now; Ray starts the others as the cluster grows."""
    if (fit := num_engines_that_fit(where, max_cluster_resources())) < where.max_actors:
        _log.warning(
            "max_actors is %d, but only %d fit into the cluster. Add nodes, or lower "
            "--where.engine-cpus",
            where.max_actors,
            fit,
        )
    now = num_engines_that_fit(where, ray.cluster_resources())
    return max(where.min_actors, min(where.max_actors, now))


def max_pool_size(where: Where) -> int:
    """Return the limit of the pool: `max_actors`, fewer where engines would take all CPUs.

    Ray Data does not count the CPUs of decode tasks, so its pool would grow into them. Engines on
    GPUs are limited by GPUs.
    """
    if where.engine_gpus:
        return where.max_actors
    fit = num_engines_that_fit(where, max_cluster_resources())
    return max(where.min_actors, min(where.max_actors, fit))


def rows_per_decode_task(capacity: int, at_most: int) -> int:
    """Return the size of decode tasks that keeps an engine full with twice its capacity in flight.

    A task starts when all its rows fit, so it has at most half of the capacity: as many decoded
    rows wait while it runs. Sizes from half the maximum to the maximum are compared; the one with
    the smallest remainder of the capacity is taken, because the remainder is not in flight when an
    engine ends all its rows in the same step.
    """
    most = min(at_most, math.ceil(capacity / 2))
    return min(range(math.ceil(most / 2), most + 1), key=lambda rows: (capacity % rows, -rows))


def parts_at_once(rows_in_flight: int, rows_per_part: int) -> int:
    """Return how many parts an actor works on: one more than its rows in flight fill.

    So the next part starts while the last rows of the one before are in the engine. It is a power
    of two: Ray Data rounds an actor's resources for each of its calls to 5 digits (exact up to
    32), so with three calls it asks an autoscaling cluster for one node too few.
    """
    wanted = 1 + math.ceil(rows_in_flight / rows_per_part)
    return 1 << (wanted - 1).bit_length()


def decode_tasks_per_actor(where: Where, rows_in_flight: int, rows_per_task: int) -> int:
    """Return how many decode tasks one actor keeps running.

    More tasks than cores start processes that only wait. On one machine Ray may declare more CPUs
    than there are cores.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cores = (os.cpu_count() or 1) if len(nodes) == 1 else math.inf
    at_most = max(1, rows_in_flight // rows_per_task)
    return int(min(at_most, _MAX_DECODE_TASKS, max(2.0, cores / where.max_actors)))


def max_cluster_resources() -> dict[str, float]:
    """Return the cluster's resources; for an autoscaling cluster its maximum."""
    grown = cluster_state.state.get_max_resources_from_cluster_config() or {}
    have = ray.cluster_resources()
    return grown | have | {key: max(have.get(key, 0), most) for key, most in grown.items()}


def num_engines_that_fit(where: Where, have: dict[str, float]) -> int:
    """Return how many engines fit into resources beside one decode task."""
    needs = {"CPU": where.engine_cpus, "GPU": where.engine_gpus}
    free = {**have, "CPU": have.get("CPU", 0) - where.decode_cpus}
    fits = [free.get(key, 0) / need for key, need in needs.items() if need]
    return max(0, math.floor(min(fits, default=math.inf)))
