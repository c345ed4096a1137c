# SPDX-License-Identifier: Apache-2.0
"""Caption every image of an index with a captioner.

images@v, captioner@v -> decode -> engine actors -> captions@v

A bad image is a row with a reason, and so is a caption that was cut off.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from sg4v_ray.batch import plan
from sg4v_ray.batch.generate import Generate, GenerateConfig, ModelSource
from sg4v_ray.batch.pixels import ModelPixels, add_images
from sg4v_ray.batch.stage import image_size, input_fingerprints, write_rows
from sg4v_ray.core.artifact import Manifest, Ref
from sg4v_ray.core.config import without_budget
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.where import Where
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.geometry import Geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkConfig:
    """What every image is asked and how the answer is decoded: all that decides a caption."""

    generate: GenerateConfig
    geometry: Geometry
    images: ImageLimits = ImageLimits()
    budget: RejectBudget = RejectBudget()


def prepare(table: pa.Table, *, limits: ImageLimits, pixels: ModelPixels) -> pa.Table:
    """Keep what a caption row needs, and add the image as the model sees it."""
    return add_images(table.select(["id", "source", "uri"]), limits=limits, encode=pixels)


def run(
    config: BulkConfig,
    *,
    engine: EngineConfig,
    images: Ref,
    captioner: Ref,
    out: Ref,
    where: Where,
    flow: plan.Flow,
) -> Manifest:
    """Write `out`, a caption or a reason for every image; resume it if it was begun.

    Raises:
        ArtifactMissing: the index or the captioner is not finished.
        ArtifactDrift: `out` was begun with another captioner, index, instruction or decoding.
        TooManyRejects: the reject budget is spent; the rows are kept.
    """
    storage = where.storage
    model = ModelSource(root=where.root, ref=captioner)
    pixels = ModelPixels(size=image_size(storage, captioner), geometry=config.geometry)
    work: dict[str, Any] = {
        "model": model,
        "engine": engine,
        "config": config.generate,
        "image_size": pixels.size,
        "text_column": "text",
        "threads": where.engine_threads,
    }
    return write_rows(
        out,
        identity={"captions": without_budget(config), "engine": engine.identity},
        inputs=input_fingerprints(storage, images, captioner),
        index=storage.sub(f"{images.path}/rows"),
        work=plan.Work(
            actor=Generate,
            kwargs=work,
            prepare=partial(prepare, limits=config.images, pixels=pixels),
            record=CaptionRow,
        ),
        budget=config.budget,
        flow=flow,
        where=where,
    )
