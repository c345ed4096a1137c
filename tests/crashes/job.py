# SPDX-License-Identifier: Apache-2.0
"""The job that is killed: index, caption, repair of the images, retry, each by the public steps.

It runs in a process that the template forks (see `template.py`), so that a start costs no imports.
The result file is written when all steps are done; a run without it was killed.
"""

import json
from dataclasses import replace
from pathlib import Path

from jobs import _steps
from jobs._cli import ray_session
from sg4v_ray.captions.bulk import BulkConfig
from sg4v_ray.core.artifact import Manifest, Ref
from sg4v_ray.core.rejects import Reject, RejectBudget
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.inference.fake import MAX_TOKENS
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.recipes.line import CaptionStep, IndexStep
from sg4v_ray.sources.folder import Folder
from sg4v_ray.sources.index import IndexConfig

IMAGES, CAPTIONER, CAPTIONS = Ref(name="images"), Ref(name="captioner"), Ref(name="captions")
RETRIED = Reject.NOT_AN_IMAGE
"""The reason whose cause is removed before the retry."""
ROWS_PER_PART = 4


def index_step(images: str) -> IndexStep:
    """Return the step that indexes the images."""
    return IndexStep(config=IndexConfig(sources=(Folder(path=images),)), out=IMAGES)


def caption_step() -> CaptionStep:
    """Return the step that captions the images with the fake engine."""
    demo = RECIPES["demo"]().caption
    assert demo is not None
    generate = replace(
        demo.config.generate,
        generation=replace(demo.config.generate.generation, max_tokens=MAX_TOKENS + 1),
    )
    config: BulkConfig = replace(
        demo.config,
        generate=generate,  # each answer of the fake engine ends
        quality=replace(demo.config.quality, min_words=1),
        budget=RejectBudget(max_reject_rate=0.5),
    )
    return CaptionStep(
        config=config,
        engine=EngineConfig(kind="fake", dtype="float32", capacity=4, max_model_len=512),
        images=IMAGES,
        captioner=CAPTIONER,
        out=CAPTIONS,
        batching=Batching(rows_per_part=ROWS_PER_PART, rows_per_task=2),
    )


def run(root: str, images: str, repaired: dict[str, str], result: Path) -> None:
    """Run all steps; a second run continues after those that are finished.

    Args:
        repaired: files of good images by the names of the damaged images that they replace.
        result: file that gets the counts of the last manifest.
    """
    where = Where(root=root, progress=False)
    _steps.index_images(index_step(images), where)
    with ray_session():
        captions = _steps.caption_images(caption_step(), where)
        if is_to_retry(captions):
            for name, file in repaired.items():
                Storage(images).put(name, Path(file).read_bytes())
            captions = _steps.retry_rejects(caption_step(), (RETRIED.value,), where)
    result.write_text(json.dumps(captions.counts))


def is_to_retry(captions: Manifest) -> bool:
    """Return True if rows are left that the retry is for."""
    return f"rejected_{RETRIED.value}" in captions.counts
