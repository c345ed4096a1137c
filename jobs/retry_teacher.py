# SPDX-License-Identifier: Apache-2.0
"""Ray job: ask the teacher again about images that were rejected, all or for some reasons.

python -m jobs.retry_teacher RECIPE [--reasons no_answer refused] [--where.root PATH_OR_URI] [flags]
ray job submit --working-dir . -- python -m jobs.retry_teacher RECIPE --where.root $PWD/runs
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs import _steps
from jobs._cli import main, parse, ray_session, summary
from sg4v_ray.recipes.line import CollectStep, Line


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryTeacher:
    """Which rejects of a finished collection are asked again."""

    collect: Annotated[CollectStep, tyro.conf.arg(name="")]
    """The collection, as its recipe has it."""
    reasons: tuple[str, ...] = ()
    """Reject reasons such as `no_answer`; none means every rejected image."""


def _pick(line: Line) -> RetryTeacher | None:
    return None if line.collect is None else RetryTeacher(collect=line.collect)


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, _pick, sys.argv[1:])
    with ray_session():
        print(summary(_steps.collect_captions(step.collect, where, retry=step.reasons)))


if __name__ == "__main__":
    main(run)
