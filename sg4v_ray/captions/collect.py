# SPDX-License-Identifier: Apache-2.0
"""Collect captions from the teacher, once each, within budget.

images@v -> draw by source -> decode -> teacher -> teacher-captions@v

Two things make a killed collection cheap: the exactly-once plan of all captioning, and below it
the ledger, which has every answer before it counts. The ledger belongs to the root: another
collection that asks the same of the same image finds the answer there.
"""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, NoReturn

import pyarrow as pa
import ray
from PIL import Image

from sg4v_ray.captions.batches import BatchLimits
from sg4v_ray.captions.choose import SampleConfig, write_chosen
from sg4v_ray.captions.in_batches import ask_in_batches, wait_for_earlier_batches
from sg4v_ray.captions.quality import QualityConfig, check_language
from sg4v_ray.captions.session import DeskHandle, PaidSoFar, desk_of
from sg4v_ray.captions.teacher import Endpoint, ImageSent, TeacherConfig
from sg4v_ray.captions.teacher_actor import (
    AskTeacher,
    DeskStatus,
)
from sg4v_ray.core.artifact import Manifest, Ref, begin, find, is_finished
from sg4v_ray.core.config import content_of
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import TeacherCaptionRow
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.exactly_once.pixels import add_images
from sg4v_ray.exactly_once.plan import ActorStep
from sg4v_ray.exactly_once.stage import Stage, input_fingerprints, retry_rejects, write_rows

_log = logging.getLogger(__name__)

Mode = Literal["online", "batch"]


@identity_keys(
    "CollectConfig",
    excluded=("fetch", "budget"),
    sample="sample",
    teacher="teacher",
    quality="quality",
    images="images",
    fetch="fetch",
    budget="budget",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class CollectConfig:
    """Which images the teacher sees and what it is asked."""

    sample: SampleConfig
    teacher: TeacherConfig
    quality: QualityConfig = QualityConfig()
    images: ImageLimits = ImageLimits()
    fetch: FetchConfig = FetchConfig()
    budget: RejectBudget = RejectBudget()


RETRY_LIMITS: Final = ("collect.images.max_bytes", "collect.images.max_pixels")
"""Limits that cause rejects and decide no answer; a retry may raise them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encode:
    """Encode an image as it is sent to a teacher."""

    sent: ImageSent

    def __call__(self, image: Image.Image) -> bytes:
        """Return the bytes of a JPEG or PNG file."""
        small, out = image.copy(), io.BytesIO()
        small.thumbnail((self.sent.max_side,) * 2, Image.Resampling.BICUBIC)
        if self.sent.format == "png":
            small.save(out, "PNG")
        else:
            small.save(out, "JPEG", quality=self.sent.quality)
        return out.getvalue()


def prepare(
    table: pa.Table, *, limits: ImageLimits, encode: Encode, fetch: FetchConfig
) -> pa.Table:
    """Keep what a caption row needs, and add the image as it is sent."""
    kept = table.select(["id", "source", "uri", "prompt"])
    return add_images(kept, limits=limits, encode=encode, fetch=fetch, hash_column="image_sha256")


def stage_of(config: CollectConfig, *, images: Ref, out: Ref, where: Where) -> Stage:
    """Return the stage without anybody who asks; it can be compared with what is finished."""
    storage = where.storage

    def step(attempt: int) -> NoReturn:
        raise AssertionError(f"attempt {attempt} has no desk")

    return Stage(
        out=out,
        identity={"collect": content_of(config)},
        inputs=input_fingerprints(storage, images),
        index=write_chosen(storage, config.sample, images, storage.sub(out.path)),
        step=step,
        budget=config.budget,
        retry_limits=RETRY_LIMITS,
    )


def _asking(stage: Stage, config: CollectConfig, endpoint: Endpoint, desk: DeskHandle) -> Stage:
    def step(attempt: int) -> ActorStep:
        return ActorStep(
            actor=AskTeacher,
            kwargs={"desk": desk, "attempt": attempt},
            prepare=_prepare_of(config),
            record=TeacherCaptionRow,
            capacity=endpoint.limits.in_flight,
            paid_usd=PaidSoFar(desk),
        )

    return replace(stage, step=step, metrics=partial(_metrics, desk))


def _prepare_of(config: CollectConfig) -> Callable[[pa.Table], pa.Table]:
    encode = Encode(sent=config.teacher.image)
    return partial(prepare, limits=config.images, fetch=config.fetch, encode=encode)


def _metrics(desk: DeskHandle) -> dict[str, Any]:
    status: DeskStatus = ray.get(desk.status.remote())
    return {
        "usd": round(status.spent_usd, 6),
        "lost_requests": len(status.lost),
        "lost_usd": round(sum(one.usd for one in status.lost), 6),
    }


def run(
    config: CollectConfig,
    *,
    endpoint: Endpoint,
    images: Ref,
    out: Ref,
    where: Where,
    batching: Batching,
    mode: Mode = "online",
    batch: BatchLimits | None = None,
    retry: tuple[str, ...] | None = None,
) -> Manifest:
    """Write `out`, a teacher caption or a reason for every drawn image; resume if begun.

    Args:
        mode: `batch` asks the provider's Batch API first; what it leaves is asked online.
        retry: ask again what was rejected for these reasons (none named: for any), online.

    Raises:
        ConfigError: the key is missing, or a source has no image.
        MoneySpent: the next request could pass `endpoint.max_usd`; answers are kept.
        TeacherBusy, TeacherUnusable: the teacher does not answer; run again to resume.
        TooManyRejects: the reject budget is spent; the rows are kept.
    """
    check_language(config.quality)
    stage = stage_of(config, images=images, out=out, where=where)
    if retry is None and is_finished(
        where.storage, out, config=stage.identity, inputs=stage.inputs
    ):
        return find(where.storage, out)
    if retry is None:  # drift is told before anything is paid
        begin(where.storage, out, stage.identity, inputs=stage.inputs)
    with desk_of(
        config.teacher,
        endpoint,
        quality=config.quality,
        batch=batch or BatchLimits(),
        out=out,
        where=where,
    ) as desk:
        stage = _asking(stage, config, endpoint, desk)
        if retry is None and mode == "batch":
            ask_in_batches(stage, _prepare_of(config), desk=desk, where=where, batching=batching)
        else:
            wait_for_earlier_batches(out, desk, where)
        if retry is not None:
            return retry_rejects(stage, retry, batching=batching, where=where)
        return write_rows(stage, batching=batching, where=where)
