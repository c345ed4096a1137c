# SPDX-License-Identifier: Apache-2.0
"""The line: every step of a system from images to scores, each with its config and its refs.

A recipe is one value of `Line`. Steps are joined by artifact names only.
"""

from dataclasses import dataclass

from sg4v_ray.captions.batches import BatchLimits
from sg4v_ray.captions.bulk import BulkConfig
from sg4v_ray.captions.collect import CollectConfig, Mode
from sg4v_ray.captions.score import ScoreConfig
from sg4v_ray.captions.teacher import Endpoint
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.dataset.build import BuildConfig
from sg4v_ray.dataset.mixture import MixConfig
from sg4v_ray.evaluation.run import EvaluateConfig
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.sources.index import IndexConfig, QuestionsConfig
from sg4v_ray.training.config import Fresh, StageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexStep:
    """Index images."""

    config: IndexConfig
    out: Ref


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionsStep:
    """Index questions about indexed images."""

    config: QuestionsConfig
    images: Ref
    out: Ref


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectStep:
    """Collect captions from the teacher."""

    config: CollectConfig
    endpoint: Endpoint
    images: Ref
    out: Ref
    batching: Batching = Batching()
    mode: Mode = "online"
    """`batch`: the provider's Batch API first, at half the price; what it leaves, online."""
    batch: BatchLimits = BatchLimits()
    local_teacher: bool = False
    """Start the recipe's own teacher on this machine and ask that one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixStep:
    """Put captions in the place of those of an instruction set."""

    config: MixConfig
    out: Ref


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetStep:
    """Build training data."""

    config: BuildConfig
    out: Ref


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStep:
    """Train a model."""

    config: StageConfig
    start: Fresh | Ref
    dataset: Ref
    out: Ref
    held_out: Ref | None = None
    """A dataset that is not trained on, for `config.held_out_every_steps`."""

    def __post_init__(self) -> None:
        if (self.held_out is None) != (self.config.held_out_every_steps is None):
            raise ConfigError(
                "held_out and config.held_out_every_steps belong together; give both or neither"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionStep:
    """Caption all images of an index."""

    config: BulkConfig
    engine: EngineConfig
    images: Ref
    captioner: Ref
    out: Ref
    batching: Batching = Batching()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreStep:
    """Score captions by how well they fit their images."""

    config: ScoreConfig
    captions: Ref
    out: Ref
    batching: Batching = Batching()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateStep:
    """Ask a model all questions of a set and score the answers."""

    config: EvaluateConfig
    engine: EngineConfig
    questions: Ref
    train_questions: Ref
    """For the share that a guess without an image gets right."""
    model: Ref
    out: Ref
    scores: Ref
    report: str
    """File below the root that gets the figures as JSON."""
    batching: Batching = Batching()


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One whole system. A step that a recipe does not have is None or an empty tuple."""

    images: tuple[IndexStep, ...] = ()
    questions: tuple[QuestionsStep, ...] = ()
    collect: CollectStep | None = None
    mix: MixStep | None = None
    datasets: tuple[DatasetStep, ...] = ()
    align: TrainStep | None = None
    captioner: TrainStep | None = None
    caption: CaptionStep | None = None
    score: ScoreStep | None = None
    """Not part of `run_all`: it needs CLIP weights, which no recipe brings."""
    pretrain: TrainStep | None = None
    finetune: TrainStep | None = None
    evaluate: EvaluateStep | None = None
