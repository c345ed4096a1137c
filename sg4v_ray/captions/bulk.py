# SPDX-License-Identifier: Apache-2.0
"""Caption every image of an index with a captioner.

images@v, captioner@v -> decode -> engine actors -> captions@v

A bad image is a row with a reason, and so is a caption that was cut off.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa

from sg4v_ray.captions.quality import QualityConfig, check_language, judge
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.config import content_of
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.rows import row_index
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import GenerateConfig, ModelSource
from sg4v_ray.exactly_once.generate import Generate
from sg4v_ray.exactly_once.pixels import ModelPixels, add_images
from sg4v_ray.exactly_once.plan import ActorStep
from sg4v_ray.exactly_once.stage import Stage, image_size, input_fingerprints
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.inference.prompt import refuse_beams
from sg4v_ray.model.geometry import Geometry


@identity_keys(
    "BulkConfig",
    excluded=("fetch", "budget"),
    generate="generate",
    geometry="geometry",
    quality="quality",
    images="images",
    fetch="fetch",
    budget="budget",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class BulkConfig:
    """The question about every image, the decoding of its answer, and limits of both. `fetch` and
    `budget` decide no caption and are not part of identity."""

    generate: GenerateConfig
    geometry: Geometry
    quality: QualityConfig = QualityConfig()
    images: ImageLimits = ImageLimits()
    fetch: FetchConfig = FetchConfig()
    budget: RejectBudget = RejectBudget()


RETRY_LIMITS: Final = (
    "captions.images.max_bytes",
    "captions.images.max_pixels",
    "captions.generate.generation.max_tokens",
)
"""Limits that cause rejects. A retry may raise them; hosts are no part of identity."""


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
    inputs, indexed = input_fingerprints(storage, captioner), find(storage, images)
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

    def step(attempt: int) -> ActorStep:
        return ActorStep(
            actor=Generate,
            kwargs={**kwargs, "attempt": attempt},
            prepare=partial(prepare, limits=config.images, pixels=pixels, fetch=config.fetch),
            record=CaptionRow,
            capacity=engine.capacity,
        )

    return Stage(
        out=out,
        identity={"captions": content_of(config), "engine": engine.identity},
        inputs={str(images): indexed.fingerprint, **inputs},
        index=row_index(storage, images, indexed),
        step=step,
        budget=config.budget,
        retry_limits=RETRY_LIMITS,
    )
