# SPDX-License-Identifier: Apache-2.0
"""Memory of a running job, process by process, so that growth is seen while it runs."""

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil
import ray

_MB = 2**20


@dataclass(slots=True)
class Watcher:
    """Samples the unique memory (USS) of a process and all below it, and the object store."""

    every_s: float = 10.0
    samples: list[tuple[float, dict[str, float], float]] = field(default_factory=list)
    """Seconds, MB by process (name and pid), MB in the object store."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Watcher":
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        started_s = time.monotonic()
        while not self._stop.wait(self.every_s):
            self.samples.append((time.monotonic() - started_s, by_process(), object_store_mb()))


def by_process() -> dict[str, float]:
    """Return the USS in MB of this process and all below it."""
    me = psutil.Process()
    found = {}
    for process in (me, *me.children(recursive=True)):
        try:
            name = "driver" if process == me else process.name()
            found[f"{name}/{process.pid}"] = process.memory_full_info().uss / _MB
        except psutil.Error:  # ended meanwhile
            continue
    return found


def object_store_mb() -> float:
    """Return what the object store of the cluster holds."""
    name = "object_store_memory"
    return (ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0)) / _MB


def growth(
    samples: list[tuple[float, dict[str, float], float]], *, after_s: float
) -> dict[str, tuple[float, float]]:
    """Return MB early (median of the first third after `after_s`) and at the end (of the last).

    Only of processes that lived the whole time; the object store is called `objects`.
    """
    late = [one for one in samples if one[0] >= after_s]
    series: dict[str, list[float]] = defaultdict(list)
    names: dict[str, str] = {}
    for _, processes, objects in late:
        for name, size in {**processes, "objects": objects}.items():
            pid = name.rpartition("/")[2]
            # Ray's workers change their names with their tasks.
            names[pid] = name if "IDLE" not in name else names.get(pid, name)
            series[pid].append(size)
    third = max(1, len(late) // 3)
    return {
        names[pid]: (sorted(values[:third])[third // 2], sorted(values[-third:])[third // 2])
        for pid, values in series.items()
        if len(values) == len(late) and late
    }
