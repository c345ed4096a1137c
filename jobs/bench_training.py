# SPDX-License-Identifier: Apache-2.0
"""Bench: the plans of the paper's two long stages, at their size and at the lengths of their rows.

python -m jobs.bench_training [--root FOLDER]

Prints one JSON line: seconds to build an epoch of each plan, peak memory, share of padding.
"""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jobs._cli import main
from sg4v_ray.model.config import llava_7b
from sg4v_ray.recipes.sharegpt4v import CAPTIONED_IMAGES, DATA, finetune, pretrain
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.job import make_plan
from sg4v_ray.training.plan import Lengths, padding_share

RATIOS = "training.json"
_TEXT_ONLY = 40_688
"""Conversations without an image in the published mix (LLaVA issue 702)."""
_TEXT_ONLY_TOKENS = 900
_SPREAD = 0.6
"""Deviation of the logarithm of a conversation's length. Assumed: wider than the captions' 0.38."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where the figures go."""

    root: str = str(Path("runs/bench-training").absolute())


def log_normal(draw: np.random.Generator, mean: float, spread: float, count: int) -> Any:
    """Return (count,) whole lengths of a log-normal distribution."""
    return np.rint(draw.lognormal(np.log(mean) - spread**2 / 2, spread, count)).astype(np.int32)


def captions(draw: np.random.Generator) -> Lengths:
    """Return rows of ShareGPT4V-PT: 576 image tokens, text of mean 190, 95% of it below 330."""
    text = log_normal(draw, 190, 0.38, CAPTIONED_IMAGES)
    return Lengths(llava_7b().num_image_tokens + text, np.ones(len(text), np.bool_))


def conversations(draw: np.random.Generator, max_length: int) -> Lengths:
    """Return rows of the published instruction mix."""
    with_image = DATA["finetune"].samples - _TEXT_ONLY
    rows = (
        llava_7b().num_image_tokens + log_normal(draw, 240, _SPREAD, with_image),
        log_normal(draw, _TEXT_ONLY_TOKENS, _SPREAD, _TEXT_ONLY),
    )
    has_image = np.repeat([True, False], [with_image, _TEXT_ONLY])
    return Lengths(np.minimum(np.concatenate(rows), max_length), has_image)


def measure(stage: StageConfig, lengths: Lengths) -> tuple[float, float]:
    """Return the seconds to build an epoch of a plan, and its share of padding."""
    began_s = time.monotonic()
    # A micro-batch without an image gets a row with one, and its first token.
    plan = make_plan(stage, lengths, image_row=llava_7b().num_image_tokens + 1)
    plan.micro_batches(0)
    took_s = time.monotonic() - began_s
    return took_s, padding_share(plan)


def run() -> None:
    """Run the bench with the flags of this process."""
    bench = tyro.cli(Bench, description=__doc__)
    draw = np.random.default_rng(0)
    pretrain_s, pretrain_share = measure(pretrain(), captions(draw))
    finetune_s, finetune_share = measure(finetune(), conversations(draw, finetune().max_length))
    ratios = {
        "case": "ratios",
        "plan_s_pretrain": round(pretrain_s, 2),
        "plan_s_finetune": round(finetune_s, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "padding_share_pretrain": round(pretrain_share, 4),
        "padding_share_finetune": round(finetune_share, 4),
    }
    last = json.dumps(ratios)
    Path(bench.root).mkdir(parents=True, exist_ok=True)
    Path(bench.root, RATIOS).write_text(f"{last}\n")
    print(last)


if __name__ == "__main__":
    main(run)
