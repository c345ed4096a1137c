# SPDX-License-Identifier: Apache-2.0
"""Ray job: align the vision tower with the language model (stage 0).

python -m jobs.align RECIPE [--where.root PATH_OR_URI] [flags]
ray job submit --working-dir . -- python -m jobs.align RECIPE --where.root $PWD/runs
"""

import sys

from jobs import _steps
from jobs._cli import main, parse, ray_session, summary


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, lambda line: line.align, sys.argv[1:])
    with ray_session(trains=True):
        print(summary(_steps.train(step, where)))


if __name__ == "__main__":
    main(run)
