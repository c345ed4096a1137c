# SPDX-License-Identifier: Apache-2.0
"""What driver and workers tell each other. The driver imports this and not the worker's code,
which takes ten seconds to import (transformers, DeepSpeed).
"""

import dataclasses
from dataclasses import dataclass
from typing import Final

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.where import TrackerKind
from sg4v_ray.exactly_once.config import ModelSource
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.loop import LASTING
from sg4v_ray.training.plan import Lengths, Plan, total_steps, unknown_lengths
from sg4v_ray.training.progress import Progress

OUTCOME: Final = "outcome.json"
BY_NAME: Final = {one.__name__: one for one in LASTING}


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
    step_deadline_s: float
    gpu: bool
    progress: bool
    held_out: Ref | None = None
    tracker: TrackerKind = "none"
    loader_processes: int = 0
    attempt: int = 0
    """Number of the driver's lease: signals of another driver are not for this run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `outcome.json` holds when a run has ended, well or not."""

    progress: Progress | None = None
    exported_step: int = 0
    """Whose weights the model folder has."""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """sha256 of the files of the model folder."""
    error: str = ""
    """Name of a class of `BY_NAME`, or empty."""
    message: str = ""


def make_plan(stage: StageConfig, lengths: Lengths, *, image_row: int) -> Plan:
    """Return the steps of a stage over the samples of a dataset.

    Args:
        image_row: tokens of the row that joins a micro-batch without an image.
    """
    steps = total_steps(
        num_samples=len(lengths),
        global_batch=stage.global_batch,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    return Plan(
        lengths=lengths,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        total_steps=steps,
        seed=stage.seed,
        window=stage.length_window,
        micro_tokens=stage.micro_tokens,
        image_row=image_row,
    )


def one_epoch(stage: StageConfig, num_samples: int) -> Plan:
    """Return a pass over a dataset that is not trained on, in its own batches."""
    rows = stage.micro_batch
    if stage.micro_tokens is not None:  # all of them may be of the full length
        rows = max(1, min(rows, stage.micro_tokens // stage.max_length))
    plan = Plan(
        lengths=unknown_lengths(num_samples),
        global_batch=stage.global_batch,
        micro_batch=rows,
        total_steps=1,
        seed=stage.seed,
    )
    return dataclasses.replace(plan, total_steps=plan.steps_per_epoch)
