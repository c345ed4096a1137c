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
from sg4v_ray.batch.stage import Stage, image_size, input_fingerprints
from sg4v_ray.captions.quality import QualityConfig, check_language, judge
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.config import content_of
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.rows import ROWS
from sg4v_ray.core.where import Where
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.inference.prompt import refuse_beams
from sg4v_ray.model.geometry import Geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkConfig:
    """What every image is asked and how the answer is decoded: all that decides a caption."""

    generate: GenerateConfig
    geometry: Geometry
    quality: QualityConfig = QualityConfig()
    images: ImageLimits = ImageLimits()
    fetch: FetchConfig = FetchConfig()
    budget: RejectBudget = RejectBudget()


def prepare(
    table: pa.Table, *, limits: ImageLimits, pixels: ModelPixels, fetch: FetchConfig
) -> pa.Table:
    """Keep what a caption row needs, and add the image as the model sees it."""
    kept = table.select(["id", "source", "uri"])
    return add_images(kept, limits=limits, encode=pixels, fetch=fetch)


def stage_of(
    config: BulkConfig,
    *,
    engine: EngineConfig,
    images: Ref,
    captioner: Ref,
    out: Ref,
    where: Where,
) -> Stage:
    """Return the stage that captions an index.

    Raises:
        ArtifactMissing: the index or the captioner is not finished.
        ConfigError: the engine has no beams, or nobody can tell the language that captions must
            be in.
    """
    refuse_beams(config.generate.generation, kind=engine.kind)
    check_language(config.quality)
    storage = where.storage
    pixels = ModelPixels(size=image_size(storage, captioner), geometry=config.geometry)
    kwargs: dict[str, Any] = {
        "model": ModelSource(root=where.root, ref=captioner),
        "engine": engine,
        "config": config.generate,
        "image_size": pixels.size,
        "text_column": "text",
        "threads": where.engine_threads,
        "accept": partial(
            judge, instruction=config.generate.instruction or "", config=config.quality
        ),
    }

    def work(attempt: int) -> plan.Work:
        return plan.Work(
            actor=Generate,
            kwargs={**kwargs, "attempt": attempt},
            prepare=partial(prepare, limits=config.images, pixels=pixels, fetch=config.fetch),
            record=CaptionRow,
        )

    return Stage(
        out=out,
        identity={"captions": content_of(config), "engine": engine.identity},
        inputs=input_fingerprints(storage, images, captioner),
        index=storage.sub(f"{images.path}/{ROWS}"),
        work=work,
        budget=config.budget,
    )
