# SPDX-License-Identifier: Apache-2.0
"""Write a page of teacher captions to read, by source: image, prompt, caption, length, flags.

python -m jobs.review_captions RECIPE [--hold-out.per-source 20] [--where.root PATH_OR_URI]
"""

import sys
from dataclasses import dataclass

from jobs._cli import main, parse
from sg4v_ray.analysis.review import PAGE, write_review
from sg4v_ray.captions.prompts import prompt
from sg4v_ray.captions.quality import QualityConfig, judge
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.recipes.line import Line


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewStep:
    """Which captions people read."""

    captions: Ref
    images: ImageLimits
    fetch: FetchConfig
    hold_out: HoldOut = HoldOut(per_source=20, seed=0)
    """Give a dataset's captions part the same hold_out, and none of these is trained on."""
    strict: QualityConfig = QualityConfig(min_words=40, max_phrase_repeats=1, language="en")
    """What is flagged on the page; what the collection itself rejected has its reason."""


def _pick(line: Line) -> ReviewStep | None:
    if line.collect is None:
        return None
    config = line.collect.config
    return ReviewStep(captions=line.collect.out, images=config.images, fetch=config.fetch)


def run() -> None:
    """Run the job with the flags of this process."""
    step, where = parse(__doc__, _pick, sys.argv[1:])

    def flag(text: str, asked: str) -> str | None:
        found = judge(text, instruction=prompt(asked).text, config=step.strict)
        return None if found is None else f"{found.reason.value}: {found.detail.split(': ')[0]}"

    figures = write_review(
        captions=step.captions,
        hold_out=step.hold_out,
        prompts=lambda name: prompt(name).text,
        flag=flag,
        limits=step.images,
        fetch=step.fetch,
        where=where,
    )
    for source, row in figures.items():
        print(f"{source}: " + ", ".join(f"{name} {value}" for name, value in row.items()))
    print(f"page: {where.storage.uri(f'{step.captions.path}/{PAGE}')}")


if __name__ == "__main__":
    main(run, stopped="run the same command again")
