# SPDX-License-Identifier: Apache-2.0
"""How each kind of step is run. Shared by the single jobs and by `run_all`."""

from contextlib import ExitStack
from dataclasses import replace

from sg4v_ray.captions import bulk, collect, score
from sg4v_ray.core.artifact import Manifest, find
from sg4v_ray.core.where import Where
from sg4v_ray.dataset import build, mixture
from sg4v_ray.evaluation import run as evaluation
from sg4v_ray.exactly_once import stage
from sg4v_ray.recipes import easy_vqa_teacher, embedded
from sg4v_ray.recipes.line import (
    CaptionStep,
    CollectStep,
    DatasetStep,
    EvaluateStep,
    IndexStep,
    MixStep,
    QuestionsStep,
    ScoreStep,
    TrainStep,
)
from sg4v_ray.sources import index


def index_images(step: IndexStep, where: Where) -> Manifest:
    """Index the images of a step."""
    return index.run(step.config, out=step.out, where=where)


def index_questions(step: QuestionsStep, where: Where) -> Manifest:
    """Index the questions of a step."""
    return index.run_questions(step.config, images=step.images, out=step.out, where=where)


def collect_captions(
    step: CollectStep, where: Where, retry: tuple[str, ...] | None = None
) -> Manifest:
    """Collect teacher captions, from the recipe's own teacher if it says so.

    Args:
        retry: ask again what was rejected for these reasons; none named means for any.
    """
    with ExitStack() as stack:
        endpoint = step.endpoint
        if step.local_teacher:
            endpoint = replace(endpoint, base_url=stack.enter_context(easy_vqa_teacher.serve()))
        return collect.run(
            step.config,
            endpoint=endpoint,
            images=step.images,
            out=step.out,
            where=where,
            batching=step.batching,
            mode=step.mode,
            batch=step.batch,
            retry=retry,
        )


def mix_dataset(step: MixStep, where: Where) -> Manifest:
    """Mix the captions of a step into its instruction data."""
    return mixture.run(step.config, out=step.out, where=where)


def build_dataset(step: DatasetStep, where: Where) -> Manifest:
    """Build the training data of a step."""
    return build.run(step.config, out=step.out, where=where)


def train(step: TrainStep, where: Where) -> Manifest:
    """Train the model of a step."""
    from sg4v_ray.training import launch  # torch: drivers that only caption do without

    return launch.run(
        step.config,
        start=step.start,
        dataset=step.dataset,
        held_out=step.held_out,
        out=step.out,
        where=where,
    )


def caption_images(step: CaptionStep, where: Where) -> Manifest:
    """Caption the images of a step; the embedded captioner is copied below the root first."""
    if step.captioner == embedded.CAPTIONER:
        find(where.storage, step.images)  # a wrong root must get no copy of the captioner
        embedded.install_captioner(where.storage)
    return stage.write_rows(_captioning(step, where), batching=step.batching, where=where)


def retry_rejects(step: CaptionStep, reasons: tuple[str, ...], where: Where) -> Manifest:
    """Caption again what was rejected; no reason means every one."""
    return stage.retry_rejects(
        _captioning(step, where), reasons, batching=step.batching, where=where
    )


def _captioning(step: CaptionStep, where: Where) -> stage.Stage:
    return bulk.stage_of(
        step.config,
        engine=step.engine,
        images=step.images,
        captioner=step.captioner,
        out=step.out,
        where=where,
    )


def score_captions(step: ScoreStep, where: Where) -> Manifest:
    """Score the captions of a step."""
    return score.run(
        step.config, captions=step.captions, out=step.out, batching=step.batching, where=where
    )


def evaluate(step: EvaluateStep, where: Where) -> Manifest:
    """Ask all questions of a step and score the answers."""
    evaluation.predict(
        step.config,
        engine=step.engine,
        questions=step.questions,
        model=step.model,
        out=step.out,
        where=where,
        batching=step.batching,
    )
    return evaluation.score(
        predictions=step.out,
        questions=step.questions,
        train_questions=step.train_questions,
        out=step.scores,
        report=step.report,
        where=where,
    )
