# SPDX-License-Identifier: Apache-2.0
"""Ray job: build the training data of a recipe from finished captions and questions.

python -m jobs.build_dataset RECIPE [--where.root PATH_OR_URI] [flags]
ray job submit --working-dir . -- python -m jobs.build_dataset RECIPE --where.root $PWD/runs
"""

import sys

from jobs import _steps
from jobs._cli import main, parse, summary


def run() -> None:
    """Run the job with the flags of this process."""
    steps, where = parse(__doc__, lambda line: line.datasets, sys.argv[1:])
    for step in steps:
        print(summary(_steps.build_dataset(step, where)))


if __name__ == "__main__":
    main(run)
