# SPDX-License-Identifier: Apache-2.0
"""Ray job: caption again the images that were rejected, all or for some reasons.

python -m jobs.retry_rejects RECIPE [--reasons missing truncated] [--where.root PATH_OR_URI] [flags]
ray job submit --working-dir . -- python -m jobs.retry_rejects RECIPE --where.root $PWD/runs
"""

import sys
from dataclasses import dataclass

from jobs import _steps
from jobs._cli import main, parse, ray_session, summary
from sg4v_ray.recipes.line import CaptionStep, Line


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryStep:
    """Which rejects of a finished captioning are tried again."""

    caption: CaptionStep
    """The captioning, as its recipe has it."""
    reasons: tuple[str, ...] = ()
    """Reject reasons such as `missing`; none means every rejected image."""


def _pick(line: Line) -> RetryStep | None:
    return None if line.caption is None else RetryStep(caption=line.caption)


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, _pick, sys.argv[1:])
    with ray_session():
        print(summary(_steps.retry_rejects(step.caption, step.reasons, where)))


if __name__ == "__main__":
    main(run)
