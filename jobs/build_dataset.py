# SPDX-License-Identifier: Apache-2.0
"""Ray job: build the training data of a recipe from finished captions and questions.

A recipe's later data wait for its captioner: what can be built is built, the rest is named.

python -m jobs.build_dataset RECIPE [--where.root PATH_OR_URI] [flags]
ray job submit --working-dir . -- python -m jobs.build_dataset RECIPE --where.root $PWD/runs
"""

import sys

from jobs import _steps
from jobs._cli import main, parse, summary
from sg4v_ray.core.errors import ArtifactMissing


def run() -> None:
    """Run the job with the flags of this process."""
    steps, where = parse(__doc__, lambda line: line.datasets, sys.argv[1:])
    waiting = []
    for step in steps:
        try:
            print(summary(_steps.build_dataset(step, where)))
        except ArtifactMissing as missing:
            waiting.append(missing)
            print(f"{step.out}: not yet, {missing}")
    if len(waiting) == len(steps):
        raise waiting[0]


if __name__ == "__main__":
    main(run)
