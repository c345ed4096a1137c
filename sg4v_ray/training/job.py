# SPDX-License-Identifier: Apache-2.0
"""What driver and workers tell each other. The driver imports this and not the worker's code,
which takes ten seconds to import (transformers, DeepSpeed).
"""

import dataclasses
from dataclasses import dataclass
from typing import Final

from sg4v_ray.batch.generate import ModelSource
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import TooManyRejects
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.training.checkpoint import Progress
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.loop import LossNotFinite
from sg4v_ray.training.plan import Plan, total_steps

TOKENIZER: Final = "start/tokenizer.json"
OUTCOME: Final = "outcome.json"
LASTING: Final = {one.__name__: one for one in (LossNotFinite, TooManyRejects)}
"""Errors that all ranks meet at the same step, and would meet again after a restart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker has to do; plain values, so that Ray can send it anywhere."""

    stage: StageConfig
    model: ModelConfig
    start: ModelSource | int
    """Weights to start from, or the seed of random ones."""
    dataset: Ref
    root: str
    out: Ref
    threads: int
    gpu: bool
    progress: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `outcome.json` holds when a run has ended, well or not."""

    progress: Progress | None = None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """sha256 of the files of the model folder."""
    error: str = ""
    """Name of a class of `LASTING`, or empty."""
    message: str = ""


def make_plan(stage: StageConfig, num_samples: int) -> Plan:
    """Return the steps of a stage over a dataset of some size."""
    steps = total_steps(
        num_samples=num_samples,
        global_batch=stage.global_batch,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    return Plan(
        num_samples=num_samples,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        total_steps=steps,
        seed=stage.seed,
    )
