# SPDX-License-Identifier: Apache-2.0
"""Bench: how close captioning comes to the bare engine, and what the machinery around it can do.

python -m jobs.bench_captions [--case engine|control-plane|scaling|all] [flags]

Prints a JSON line a measurement, a table, and last the ratios. Nothing is compared with another
machine or another day: each ratio is of runs side by side.
"""

import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import tyro

from jobs import _bench_parts as parts
from jobs import _bench_site as site
from jobs._bench_run import empty, last_line
from jobs._cli import main
from sg4v_ray.batch.watch import STATUS
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.text_table import text_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured, and how much of it."""

    case: Literal["engine", "control-plane", "scaling", "all"] = "all"
    root: str = str(Path("runs/bench").absolute())
    """Folder for images, model and results: a new one, or one that an earlier bench filled, which
    is emptied first."""
    threads: int = 1
    """CPU threads of the engine, the same in every case. One core less than the machine has: an
    engine on accelerators does not take the CPUs that feed it either."""
    images: int = 100
    """Photographs of the engine case."""
    pairs: int = 3
    """Alternating pairs of bare engine and whole job."""
    published_images: int = 48
    """Photographs for the published settings, which are slow."""
    rows: int = 300_000
    """Rows of the control-plane case; ShareGPT4V-PT has 1,200,000."""
    actors: int = 64
    """Actors of the scaling case; it is compared with one."""
    part: Literal["none", "bare", "job", "published", "rows", "actors"] = "none"
    """One measurement in a process of its own; set by the bench itself."""
    out: str = "captions"
    """Name of the artifact that a part writes; set by the bench itself."""


_SCALING_SECONDS: Final = 90
"""How long the scaling case keeps all its actors busy."""
_START_SECONDS: Final = 2
"""What one actor more takes to start, on a small machine; those before it work meanwhile."""
_MODULE: Final = "jobs.bench_captions"
_CASES: Final = ("engine", "control-plane", "scaling")
RATIOS: Final = "ratios.json"


def flags_of(bench: Bench, part: str, **changed: Any) -> list[str]:
    """Return the flags that run one part."""
    settings = {**asdict(bench), **changed, "part": part}
    return [f"--{field.name.replace('_', '-')}={settings[field.name]}" for field in fields(Bench)]


def measure(bench: Bench, part: str, **changed: Any) -> dict[str, Any]:
    """Run one part in a process of its own and return what its last line says."""
    return last_line(_MODULE, flags_of(bench, part, **changed), threads=bench.threads)


def engine_case(bench: Bench) -> dict[str, float]:
    """Compare the whole job with the bare engine, and with the published settings."""
    site.make_photos(Path(bench.root, "photos"), bench.images)
    parts.prepare_engine_case(bench.root, bench.images)
    pairs = [
        (measure(bench, "bare")["images_per_s"], measure(bench, "job")["images_per_s"])
        for _ in range(bench.pairs)
    ]
    published = measure(bench, "published")["images_per_s"]
    job = statistics.median(job for _, job in pairs)
    return {
        "job_over_bare": round(statistics.median(job / bare for bare, job in pairs), 3),
        "job_over_published": round(job / published, 2),
    }


def control_plane_case(bench: Bench) -> dict[str, float]:
    """Send rows through everything but a model; then kill a second run at half and start again."""
    parts.prepare_rows(bench.root, bench.rows)
    found = measure(bench, "rows", out="rows")
    memory: dict[str, tuple[float, float]] = found["memory_mb"]
    return {
        "control_plane_rows_per_s": found["rows_per_s"],
        "memory_end_over_early": round(max(end / early for early, end in memory.values()), 3),
        "driver_mb": max(mb for name, both in memory.items() if "driver" in name for mb in both),
        "restart_s": restart_s(bench),
    }


def restart_s(bench: Bench) -> float:
    """Kill a run at half of its rows; return how long the next one takes to its first new row."""
    home = Storage(bench.root).sub("rows-killed/v1")
    argv = [sys.executable, "-m", _MODULE, *flags_of(bench, "rows", out="rows-killed")]
    first = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _wait_for_rows(first, home, bench.rows // 2)
    first.kill()
    first.wait()
    done = _done(home)
    started_s = time.monotonic()
    second = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _wait_for_rows(second, home, done + 1)
    seconds = round(time.monotonic() - started_s, 1)
    second.kill()
    second.wait()
    print(json.dumps({"part": "restart", "at_rows": done, "seconds": seconds}), flush=True)
    return seconds


def _done(home: Storage) -> int:
    return int(json.loads(home.get(STATUS))["done"]) if home.exists(STATUS) else 0


def _wait_for_rows(job: "subprocess.Popen[bytes]", home: Storage, rows: int) -> None:
    while _done(home) < rows:
        if job.poll() is not None:
            raise Sg4vError("the job ended before it was killed; its error is above")
        with suppress(subprocess.TimeoutExpired):
            job.wait(timeout=0.5)


def scaling_case(bench: Bench) -> dict[str, float]:
    """Compare many actors with one, each as slow as a set latency."""
    rates = []
    for actors in (1, bench.actors):
        seconds = _SCALING_SECONDS + _START_SECONDS * actors
        parts.prepare_rows(bench.root, 5 * actors * seconds)
        rates.append(measure(bench, "actors", actors=actors)["images_per_s"])
    one, many = rates
    return {f"scaling_{bench.actors}_over_1": round(many / (bench.actors * one), 3)}


def run() -> None:
    """Run the cases that the flags of this process name."""
    bench = tyro.cli(Bench, description=__doc__)
    bench = replace(bench, root=str(Path(bench.root).absolute()))
    if bench.part != "none":
        return getattr(parts, bench.part)(bench)
    empty(Path(bench.root))
    print(json.dumps({"machine": parts.machine(bench.threads)}), flush=True)
    runs = {
        "engine": engine_case,
        "control-plane": control_plane_case,
        "scaling": scaling_case,
    }
    wanted = _CASES if bench.case == "all" else (bench.case,)
    ratios: dict[str, Any] = {}
    for case in wanted:
        ratios |= runs[case](bench)
    print(text_table([("figure", "value"), *((key, str(value)) for key, value in ratios.items())]))
    last = json.dumps({"case": "ratios", **ratios, "ran": list(wanted)})
    Path(bench.root, RATIOS).write_text(f"{last}\n")
    print(last, flush=True)
    return None


if __name__ == "__main__":
    main(run, stopped="nothing was measured, a bench begins anew")
