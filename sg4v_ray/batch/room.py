# SPDX-License-Identifier: Apache-2.0
"""How many engines a cluster holds beside the tasks that feed them.

Ray gives CPUs to whoever asks first. Engines that took them all would wait for rows for ever.
"""

import logging
import math

import ray
from ray._private import state as cluster_state

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.where import Where

_log = logging.getLogger(__name__)

LIGHT_CPUS = 0.25
"""What a read or write task reserves: at 1 CPU each they would starve the engine of a
2-CPU machine, and the plan would wait for ever."""


def check_cluster(where: Where) -> None:
    """Raise ConfigError if the cluster cannot run the smallest form of the plan.

    Without this a plan that is too big waits for ever, without a word.
    """
    have = grown_resources()
    if _room(where, have) < where.min_actors:
        need_cpus = where.min_actors * where.engine_cpus + _light_cpus(where)
        need_gpus = where.min_actors * where.engine_gpus
        raise ConfigError(
            f"the cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; "
            f"{where.min_actors} engine(s) of {where.engine_cpus:g} CPUs and "
            f"{where.engine_gpus:g} GPUs and the light tasks need {need_cpus:g} and "
            f"{need_gpus:g}. Lower --where.engine-cpus or --where.min-actors, or add nodes."
        )


def actors_at_once(where: Where) -> int:
    """Return how many of `max_actors` this cluster holds now; Ray starts the others as it grows.

    Asked for more, Ray would give the light tasks' CPUs to engines, which then wait for rows for
    ever.
    """
    if (room := _room(where, grown_resources())) < where.max_actors:
        _log.warning(
            "%d actors are wanted, the cluster has room for %d. Add nodes, or lower "
            "--where.engine-cpus",
            where.max_actors,
            room,
        )
    return max(where.min_actors, min(where.max_actors, _room(where, ray.cluster_resources())))


def grown_resources() -> dict[str, float]:
    """Return the cluster's resources; of an autoscaling one, what it may grow to."""
    grown = cluster_state.state.get_max_resources_from_cluster_config() or {}
    have = ray.cluster_resources()
    return grown | have | {key: max(have.get(key, 0), most) for key, most in grown.items()}


def _light_cpus(where: Where) -> float:
    """Return the CPUs of one task each that reads, decodes and writes."""
    return 2 * LIGHT_CPUS + where.decode_cpus


def _room(where: Where, have: dict[str, float]) -> int:
    """Return how many engines fit into these resources beside the light tasks."""
    needs = {"CPU": where.engine_cpus, "GPU": where.engine_gpus}
    free = {**have, "CPU": have.get("CPU", 0) - _light_cpus(where)}
    fits = [free.get(key, 0) / need for key, need in needs.items() if need]
    return max(0, math.floor(min(fits, default=math.inf)))
