# SPDX-License-Identifier: Apache-2.0
"""Write the report of finished captions: figures, curves, lengths, rejects, a gallery, a card.

python -m jobs.report_captions RECIPE [--where.root PATH_OR_URI]
"""

import json
import sys

from jobs._cli import main, parse
from sg4v_ray.analysis.captioning import write_report
from sg4v_ray.core.artifact import Ref
from sg4v_ray.recipes.line import Line


def _pick(line: Line) -> Ref | None:
    return None if line.caption is None else line.caption.out


def run() -> None:
    """Run the job with the flags of this process."""
    captions, where = parse(__doc__, _pick, sys.argv[1:])
    print(json.dumps(write_report(captions=captions, where=where), indent=1))
    print(f"report: {where.storage.uri(f'{captions.path}/report.html')}")


if __name__ == "__main__":
    main(run, stopped="run the same command again")
