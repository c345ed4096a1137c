# SPDX-License-Identifier: Apache-2.0
"""Put a teacher's captions in the place of the detailed captions of LLaVA's instruction data.

python -m jobs.mix_dataset RECIPE --config.sft FILE --config.captions FILE [--where.root ROOT]
"""

import json
import sys

from jobs import _steps
from jobs._cli import main, parse, summary
from sg4v_ray.dataset.mix_report import table
from sg4v_ray.dataset.mixture import REPORT


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, lambda line: line.mix, sys.argv[1:])
    manifest = _steps.mix_dataset(step, where)
    home = where.storage.sub(step.out.path)
    print(table(json.loads(home.get(REPORT))))
    print(f"{summary(manifest)}: {home.uri(step.config.file)}")


if __name__ == "__main__":
    main(run, stopped="nothing was written, run the same again")
