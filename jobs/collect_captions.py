# SPDX-License-Identifier: Apache-2.0
"""Ray job: collect captions from the teacher.

python -m jobs.collect_captions RECIPE [--where.root PATH_OR_URI] [flags]
ray job submit --working-dir . -- python -m jobs.collect_captions RECIPE --where.root $PWD/runs
"""

import sys

from jobs import _steps
from jobs._cli import main, parse, ray_session, summary


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, lambda line: line.collect, sys.argv[1:])
    with ray_session():
        print(summary(_steps.collect_captions(step, where)))


if __name__ == "__main__":
    main(run)
