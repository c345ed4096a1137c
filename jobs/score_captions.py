# SPDX-License-Identifier: Apache-2.0
"""Ray job: score finished captions with CLIP, and hash their images.

python -m jobs.score_captions RECIPE --config.clip.weights FILE.safetensors [flags]
ray job submit --working-dir . -- python -m jobs.score_captions RECIPE --where.root $PWD/runs ...
"""

import sys

from jobs import _steps
from jobs._cli import main, parse, ray_session, summary


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, lambda line: line.score, sys.argv[1:])
    with ray_session():
        print(summary(_steps.score_captions(step, where)))


if __name__ == "__main__":
    main(run)
