# SPDX-License-Identifier: Apache-2.0
"""Bench: build the published instruction mix of 665,058 records from synthetic files of its sizes.

python -m jobs.bench_mixture [--scale 0.01] [--root FOLDER]

Prints one JSON line: seconds and MB/s of the whole process, its peak memory, records by source.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jobs import _mix_files as files
from jobs._bench_run import empty
from jobs._cli import main
from sg4v_ray.core.errors import ConfigError, Sg4vError
from sg4v_ray.dataset.details import NUM_DETAILS
from sg4v_ray.dataset.layout import source_of
from sg4v_ray.recipes.mixes import MIX, PUBLISHED_NAME

RESULT = "mixture.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured."""

    scale: float = 1.0
    """Share of the published numbers of records; 1 takes 3 GB of disk."""
    root: str = str(Path("runs/bench-mixture").absolute())
    """Folder for the files: a new one, or one that an earlier bench filled, which is emptied."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.scale <= 1:
            raise ConfigError(f"scale must be 0.01 to 1, got {self.scale}")


def argv_of(bench: Bench) -> list[str]:
    """Return the command that builds the mix."""
    root = Path(bench.root)
    flags = {
        "config.sft": root / "mix.json",
        "config.captions": root / "captions.json",
        "config.expect-removed": files.count(NUM_DETAILS, bench.scale),
        "where.root": root / "runs",
    }
    for number, share in enumerate(files.shares(bench.scale)):
        flags[f"config.take.{number}.captions"] = share.captions
    job = [sys.executable, "-m", "jobs.mix_dataset", "sft-mix-published"]
    return [*job, *(f"--{key}={value}" for key, value in flags.items())]


def measure(bench: Bench) -> dict[str, Any]:
    """Write the files, build the mix in a process of its own, and count what it made."""
    root = Path(bench.root)
    files.write_mix(root / "mix.json", bench.scale)
    files.write_captions(root / "captions.json", bench.scale)
    started_s = time.monotonic()
    process = subprocess.Popen(argv_of(bench), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Sg4vError(f"the mix ended with exit code {process.returncode}; see above")
    made = root / "runs" / MIX.path / PUBLISHED_NAME
    read_mb = sum((root / name).stat().st_size for name in ("mix.json", "captions.json")) / 1e6
    sources = sources_in(made)
    return {
        "part": "mixture",
        "scale": bench.scale,
        "cpus": os.cpu_count(),
        "records": sources.total(),
        "input_mb": round(read_mb),
        "output_mb": round(made.stat().st_size / 1e6),
        "seconds": round(seconds, 1),
        "mb_per_s": round(read_mb / seconds, 1),
        "peak_rss_mb": round(usage.ru_maxrss / 1024),
        "sources": dict(sorted(sources.items())),
    }


def sources_in(mix: Path) -> Counter[str]:
    """Count a mix by source, line by line and so without the reader that made it."""
    sources: Counter[str] = Counter()
    with mix.open(encoding="utf-8") as lines:
        for line in lines:
            if len(line) > 2:
                sources[source_of(json.loads(line.rstrip(",\n")).get("image"))] += 1
    return sources


def run() -> None:
    """Run the bench with the flags of this process."""
    bench = tyro.cli(Bench, description=__doc__)
    root = Path(bench.root).absolute()
    bench = Bench(scale=bench.scale, root=str(root))
    empty(root)
    found = measure(bench)
    if found["sources"] != dict(sorted(files.expected(bench.scale).items())):
        raise Sg4vError(f"expected are {files.expected(bench.scale)}, found {found['sources']}")
    line = json.dumps(found)
    (root / RESULT).write_text(f"{line}\n")
    print(line, flush=True)


if __name__ == "__main__":
    main(run, stopped="nothing was measured, a bench begins anew")
