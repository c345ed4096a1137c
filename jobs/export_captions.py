# SPDX-License-Identifier: Apache-2.0
"""Write finished captions as the JSON that LLaVA and ShareGPT4V publish.

python -m jobs.export_captions RECIPE [--to llava.json] [--where.root PATH_OR_URI]
"""

import sys
from dataclasses import dataclass

from jobs._cli import main, parse
from sg4v_ray.captions.export import export
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.recipes.line import Line


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportStep:
    """Which captions are written, and where."""

    captions: Ref
    """The finished captions."""
    to: str = "llava.json"
    """File below the captions' artifact."""
    seed: int = 0
    """Chooses the question that stands before each caption."""
    hold_out: HoldOut = HoldOut()
    """Give what `review_captions` had, and what people read of a teacher is left out."""


def _pick(line: Line) -> ExportStep | None:
    return None if line.caption is None else ExportStep(captions=line.caption.out)


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, _pick, sys.argv[1:])
    count = export(
        captions=step.captions, to=step.to, seed=step.seed, hold_out=step.hold_out, where=where
    )
    print(f"{count} records: {where.storage.uri(f'{step.captions.path}/{step.to}')}")


if __name__ == "__main__":
    main(run, stopped="run the same command again")
