# SPDX-License-Identifier: Apache-2.0
"""Ray job: collect captions from the teacher, within a budget and never twice.

python -m jobs.collect_captions RECIPE --dry-run     what it will take: tokens, dollars, hours
python -m jobs.collect_captions RECIPE [--endpoint.max-usd 300] [--where.root PATH_OR_URI]
ray job submit --working-dir . -- python -m jobs.collect_captions RECIPE --where.root $PWD/runs
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs import _steps
from jobs._cli import main, parse, ray_session, summary
from sg4v_ray.captions.estimate import estimate, table
from sg4v_ray.recipes.line import CollectStep, Line


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectJob:
    """What this job does."""

    collect: Annotated[CollectStep, tyro.conf.arg(name="")]
    """The collection, as its recipe has it."""
    dry_run: bool = False
    """Print what it will take, and send nothing."""


def _pick(line: Line) -> CollectJob | None:
    return None if line.collect is None else CollectJob(collect=line.collect)


def run() -> None:
    """Run the job with the flags of this process."""
    job, where = parse(__doc__, _pick, sys.argv[1:])
    step = job.collect
    if job.dry_run:
        parts = estimate(step.config, step.endpoint, images=step.images, where=where)
        print(table(parts))
        return
    with ray_session():
        manifest = _steps.collect_captions(step, where)
        print(f"{summary(manifest)}, ${manifest.metrics.get('usd', 0):.4f}")


if __name__ == "__main__":
    main(run, stopped="every answer that came is stored and is not paid for again; run the same")
