# SPDX-License-Identifier: Apache-2.0
"""Bench: throughput of a captioning job beside the bare engine, and of everything but a model.

python -m jobs.bench_captions [--case engine|control-plane|scaling|all] [flags]

Prints a JSON line for each measurement, a table, and last the ratios. Nothing is compared with
another machine or another day: each ratio is of runs side by side. The control plane is compared
with that of commit 58447b5, which runs from a folder below the bench's root.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import tyro

from jobs import _bench_parts as parts
from jobs import _bench_site as site
from jobs._bench_run import check_out, empty, killable_job, last_line, part_objects
from jobs._cli import main
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.text_table import text_table
from sg4v_ray.exactly_once.plan import attempt_folder
from sg4v_ray.inference import fake


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Sizes of the measurements."""

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
    old_rows: int = 200_000
    """Rows for the old commit, which is slower; 0 leaves it out."""
    actors: int = 64
    """Actors of the scaling case; it is compared with one."""
    part: Literal["none", "bare", "job", "published", "rows", "actors"] = "none"
    """One measurement in a process of its own; set by the bench itself."""
    out: str = "captions"
    """Name of the artifact that a part writes; set by the bench itself."""


OLD_COMMIT: Final = "58447b5"
"""The last commit before parts: rows with notes, a scan of all finished ids at each start."""
_PREPARE_OLD: Final = (
    "import sys; from jobs import _bench_parts; "
    "_bench_parts.prepare_rows(sys.argv[1], int(sys.argv[2]))"
)
_SCALING_SECONDS: Final = 90
"""How long the scaling case keeps all its actors busy."""
_START_SECONDS: Final = 2
"""Start of one more actor on a small machine; those before it work meanwhile."""
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
    """Send rows through everything but a model, with the old code too; then kill and resume a run.

    Memory figures are those of the present code.
    """
    old_tree = Path(bench.root, "old-commit")
    if bench.old_rows:
        check_out(OLD_COMMIT, old_tree)
    parts.prepare_rows(bench.root, bench.rows)
    found = measure(bench, "rows", out="rows")
    rate, memory = found["rows_per_s"], found["memory_mb"]
    rates = {"control_plane_rows_per_s": rate}
    if bench.old_rows:
        old = old_rows_per_s(bench, old_tree)
        rates |= {"old_rows_per_s": old, "control_plane_over_old": round(rate / old, 2)}
    return {
        **rates,
        "memory_end_over_early": round(max(end / early for early, end in memory.values()), 3),
        "driver_mb": max(mb for name, both in memory.items() if "driver" in name for mb in both),
        "restart_s": restart_s(bench),
    }


def old_rows_per_s(bench: Bench, tree: Path) -> float:
    """Return the rows/s of the old commit, on an index of the same images in its own format.

    It runs with the FakeEngine of the present code. Its imports of `sg4v_ray.batch` fail where
    another tree is imported, so it never runs a mixture of the two.
    """
    shutil.copy(fake.__file__, tree / "sg4v_ray/inference/fake.py")
    root = Path(bench.root, "old-runs")
    root.mkdir()
    python_path = {"PYTHONPATH": str(tree)}
    prepare = [sys.executable, "-c", _PREPARE_OLD, str(root), str(bench.old_rows)]
    if subprocess.run(prepare, env=os.environ | python_path, cwd=tree, check=False).returncode:
        raise Sg4vError(f"commit {OLD_COMMIT} wrote no index; its error is above")
    settings = {"rows": bench.old_rows, "threads": bench.threads, "root": root, "out": "rows"}
    flags = ["--part=rows", *(f"--{key}={value}" for key, value in settings.items())]
    found = last_line(_MODULE, flags, threads=bench.threads, more=python_path, cwd=tree)
    return float(found["rows_per_s"])


def restart_s(bench: Bench) -> float:
    """Kill a run at half of its rows; return the seconds of the next one to its first new part.

    From the start of the process to the part object: a committed part is kept, a row in memory is
    not.
    """
    folder = Path(bench.root, "rows-killed", "v1", attempt_folder(1))
    argv = [sys.executable, "-m", _MODULE, *flags_of(bench, "rows", out="rows-killed")]
    with killable_job(argv, folder, threads=bench.threads) as first:
        first.wait_for_parts(bench.rows // 2 // parts.ROWS_PER_PART)
        first.kill()
    done = part_objects(folder)
    with killable_job(argv, folder, threads=bench.threads) as second:
        second.wait_for_parts(1)
        seconds = round(second.first_part_s or 0.0, 1)
    line = {"part": "restart", "at_rows": done * parts.ROWS_PER_PART, "seconds": seconds}
    print(json.dumps(line), flush=True)
    return seconds


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
    main(run, stopped="nothing was measured, a bench starts again from nothing")
