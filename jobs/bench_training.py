# SPDX-License-Identifier: Apache-2.0
"""Bench: the plans of the paper's two long stages at their size, and a training step of ours
beside one of a bare DeepSpeed script.

python -m jobs.bench_training [--case plan|engine|all] [flags]

Prints a JSON line a measurement, and last the ratios. Step times are never compared with another
machine or another day: each ratio is of runs side by side.
"""

import dataclasses
import json
import math
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import tyro

from jobs import _bench_training as parts
from jobs._bench_run import empty, last_line
from jobs._cli import main
from sg4v_ray.core.errors import ConfigError, Sg4vError
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


_SETTLED: Final = 3
"""Steps before those that are timed: memory grows, and kernels are chosen, in the first ones."""
_KEEPS_MEMORY: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""For both sides. Else glibc gives large tensors back to the kernel when they are freed, and up to
a third of a step on CPUs is page faults, more or fewer by the thread that computes and by what else
the host does: no matter of accelerators, whose memory torch keeps itself."""
_TOLERANCE: Final = 1e-3
"""Relative difference of two losses above which two sides did not do the same work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured, and how much of it."""

    case: Literal["plan", "engine", "all"] = "all"
    root: str = str(Path("runs/bench-training").absolute())
    """Folder for images, models and results: a new one, or one that an earlier bench filled, which
    is emptied first."""
    threads: int = 1
    """CPU threads that compute, the same on both sides. One core less than the machine has: it is
    left to Ray, and to the decoding of images on both sides."""
    steps: int = 20
    """Steps of a run; those after the third are timed."""
    pairs: int = 3
    """Alternating pairs of the bare script and Ray Train with our loop."""
    part: Literal["none", "ours"] = "none"
    """One run in a process of its own; set by the bench itself."""
    out: str = "ours"
    """Name of the artifact that a run writes; set by the bench itself."""

    def __post_init__(self) -> None:
        if self.steps <= _SETTLED or self.pairs < 1:
            raise ConfigError(
                f"steps must be above {_SETTLED} and pairs at least 1, got {self.steps} and "
                f"{self.pairs}"
            )


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


def plan_case(_: Bench) -> dict[str, float]:
    """Build an epoch of the plans of the two long stages."""
    draw = np.random.default_rng(0)
    pretrain_s, pretrain_share = measure(pretrain(), captions(draw))
    finetune_s, finetune_share = measure(finetune(), conversations(draw, finetune().max_length))
    return {
        "plan_s_pretrain": round(pretrain_s, 2),
        "plan_s_finetune": round(finetune_s, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "padding_share_pretrain": round(pretrain_share, 4),
        "padding_share_finetune": round(finetune_share, 4),
    }


def engine_case(bench: Bench) -> dict[str, float]:
    """Train with the bare script and with Ray Train, our loop and our loading, in turn."""
    cores = os.cpu_count()
    machine = {"cores": cores, "compute_threads": bench.threads, "training_workers": 1}
    print(json.dumps({"machine": machine}), flush=True)
    parts.prepare(Path(bench.root), bench.steps)
    pairs = [_pair(bench, number) for number in range(bench.pairs)]
    return {
        "step_time_over_bare": round(statistics.median(ratio for ratio, _ in pairs), 3),
        "data_wait_share": round(max(share for _, share in pairs), 5),
    }


def _pair(bench: Bench, number: int) -> tuple[float, float]:
    """Return our time of a step over the bare one's, and our share of waiting for data.

    Raises:
        Sg4vError: a run failed, or the two did not compute the same losses.
    """
    shared = [f"--{name}={getattr(bench, name)}" for name in ("root", "steps", "threads")]
    how: dict[str, Any] = {"threads": bench.threads, "more": _KEEPS_MEMORY}
    bare = last_line("jobs._bench_bare", shared, **how)
    ours = last_line("jobs.bench_training", [*shared, "--part=ours", f"--out=ours-{number}"], **how)
    check_same(bare["losses"], ours["losses"])
    ratio = step_s(ours["step_seconds"]) / step_s(bare["step_seconds"])
    return ratio, float(ours["data_wait_share"])


def step_s(seconds: Sequence[float]) -> float:
    """Return the mean seconds of the steps that are timed."""
    return statistics.fmean(seconds[_SETTLED:])


def check_same(bare: Sequence[float], ours: Sequence[float]) -> None:
    """Raise Sg4vError unless two runs had the same losses; else their times compare nothing."""
    for step, (one, other) in enumerate(zip(bare, ours, strict=True)):
        if not math.isclose(one, other, rel_tol=_TOLERANCE):
            raise Sg4vError(
                f"the loss of step {step} is {one:.6f} in the bare script and {other:.6f} in our "
                "loop; they do not compute the same, so their times cannot be compared"
            )


def _ours(bench: Bench) -> None:
    """Train once, and print seconds and loss of each step."""
    manifest = parts.train(bench.root, bench.out, steps=bench.steps, threads=bench.threads)
    wanted = ("step_seconds", "losses", "data_wait_share")
    print(json.dumps({"part": "ours", **{name: manifest.metrics[name] for name in wanted}}))


_KEYS: Final = (
    *("step_time_over_bare", "data_wait_share", "padding_share_pretrain"),
    *("padding_share_finetune", "plan_s_pretrain", "plan_s_finetune", "peak_mb"),
)


def run() -> None:
    """Run the cases that the flags of this process name."""
    bench = tyro.cli(Bench, description=__doc__)
    bench = dataclasses.replace(bench, root=str(Path(bench.root).absolute()))
    if bench.part == "ours":
        return _ours(bench)
    empty(Path(bench.root))
    runs = {"plan": plan_case, "engine": engine_case}
    found: dict[str, float] = {}
    for case in runs if bench.case == "all" else (bench.case,):
        found |= runs[case](bench)
    last = json.dumps({"case": "ratios", **{key: found[key] for key in _KEYS if key in found}})
    Path(bench.root, RATIOS).write_text(f"{last}\n")
    print(last)
    return None


if __name__ == "__main__":
    main(run, stopped="nothing was measured, a bench begins anew")
