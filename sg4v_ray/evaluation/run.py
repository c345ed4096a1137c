# SPDX-License-Identifier: Apache-2.0
"""Ask a model every question of a set, and score the answers.

questions@v, vlm@v -> engine actors -> predictions@v -> scores@v
"""

import json
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.config import content_of
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import Prediction, Question
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.rows import read_rows, row_index
from sg4v_ray.core.where import Where
from sg4v_ray.evaluation.metrics import by_answer, commonest_answer_accuracy, exact_match
from sg4v_ray.exactly_once.config import Batching, GenerateConfig, ModelSource
from sg4v_ray.exactly_once.generate import Generate
from sg4v_ray.exactly_once.pixels import ModelPixels, add_images
from sg4v_ray.exactly_once.plan import ActorStep
from sg4v_ray.exactly_once.stage import Stage, image_size, input_fingerprints, write_rows
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.geometry import Geometry


@identity_keys(
    "EvaluateConfig",
    excluded=("budget",),
    generate="generate",
    geometry="geometry",
    images="images",
    budget="budget",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How the questions are asked."""

    generate: GenerateConfig
    geometry: Geometry
    images: ImageLimits = ImageLimits()
    budget: RejectBudget = RejectBudget(max_reject_rate=0.0)
    """No question of a benchmark may be left out by default."""


def prepare(table: pa.Table, *, limits: ImageLimits, pixels: ModelPixels) -> pa.Table:
    """Keep what a prediction needs, and add the image as the model sees it."""
    columns = ["id", "image_id", "uri", "text", "answers"]
    return add_images(table.select(columns), limits=limits, encode=pixels, fetch=FetchConfig())


def predict(
    config: EvaluateConfig,
    *,
    engine: EngineConfig,
    questions: Ref,
    model: Ref,
    out: Ref,
    where: Where,
    batching: Batching,
) -> Manifest:
    """Write `out`, an answer or a reason for every question; resume it if it was begun."""
    storage = where.storage
    asked, inputs = find(storage, questions), input_fingerprints(storage, model)
    pixels = ModelPixels(size=image_size(storage, model), geometry=config.geometry)
    kwargs = {
        "model": ModelSource(root=where.root, ref=model),
        "engine": engine,
        "config": config.generate,
        "image_size": pixels.size,
        "text_column": "prediction",
        "threads": where.engine_threads,
    }
    stage = Stage(
        out=out,
        identity={"evaluate": content_of(config), "engine": engine.identity},
        inputs={str(questions): asked.fingerprint, **inputs},
        index=row_index(storage, questions, asked),
        step=lambda attempt: ActorStep(
            actor=Generate,
            kwargs={**kwargs, "attempt": attempt},
            prepare=partial(prepare, limits=config.images, pixels=pixels),
            record=Prediction,
            capacity=engine.capacity,
        ),
        budget=config.budget,
    )
    return write_rows(stage, batching=batching, where=where)


def score(
    *,
    predictions: Ref,
    questions: Ref,
    train_questions: Ref,
    out: Ref,
    report: str,
    where: Where,
) -> Manifest:
    """Score finished predictions as `out`, and copy the figures to the file `<root>/<report>`."""
    storage = where.storage
    config = {"metric": "exact_match", "predictions": str(predictions)}
    inputs = input_fingerprints(storage, predictions, questions, train_questions)
    if not is_finished(storage, out, config=config, inputs=inputs):
        rows = read_rows(storage, predictions, Prediction)
        test = read_rows(storage, questions, Question)
        train = read_rows(storage, train_questions, Question)
        facts = {
            "vqa_accuracy": round(exact_match(rows), 4),
            "commonest_answer_accuracy": round(commonest_answer_accuracy(train, test), 4),
            "by_answer": {key: list(value) for key, value in by_answer(rows).items()},
        }
        with hold(storage.sub(out.path)) as lease:
            begin(storage, out, config, inputs=inputs, lease=lease)
            counts = {"questions": len(rows), "rejected": sum(1 for one in rows if one.reject)}
            commit(
                storage,
                out,
                config=config,
                inputs=inputs,
                counts=counts,
                metrics=facts,
                lease=lease,
            )
    manifest = find(storage, out)
    figures = {**manifest.metrics, **manifest.counts}
    storage.put(report, (json.dumps(figures, indent=1) + "\n").encode())
    return manifest
