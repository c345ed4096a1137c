# SPDX-License-Identifier: Apache-2.0
"""Collect captions from the teacher, once each, within budget.

images@v -> draw by source -> decode -> teacher -> teacher-captions@v

Two things make a killed collection cheap: the exactly-once plan of all captioning, and below it
the ledger, which has every answer before it counts. The ledger belongs to the root: another
collection that asks the same of the same image finds the answer there.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, Literal, NoReturn, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from PIL import Image
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sg4v_ray.batch import plan
from sg4v_ray.batch.pixels import add_images
from sg4v_ray.batch.room import LIGHT_CPUS, check_cluster
from sg4v_ray.batch.stage import Stage, input_fingerprints, retry_rejects, write_rows
from sg4v_ray.captions.batches import BatchLimits
from sg4v_ray.captions.choose import SampleConfig, write_chosen
from sg4v_ray.captions.ledger import Lost
from sg4v_ray.captions.quality import QualityConfig, check_language
from sg4v_ray.captions.teacher import Endpoint, ImageSent, TeacherConfig
from sg4v_ray.captions.teacher_actor import (
    AT_DESK,
    COLUMNS,
    AskTeacher,
    DeskStatus,
    TeacherDesk,
)
from sg4v_ray.core.artifact import Manifest, Ref, begin, find, is_finished
from sg4v_ray.core.config import content_of
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import TeacherCaptionRow
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where

_log = logging.getLogger(__name__)

LEDGER: Final = "teacher-ledger"
"""Folder below the root with all that was ever sent to teachers."""
LOST: Final = "lost.json"
"""File of an artifact: the requests that may have been paid for without an answer."""
Mode = Literal["online", "batch"]
DeskHandle: TypeAlias = "ray.actor.ActorHandle[TeacherDesk]"
_NAMED: Final = 10
"""Rows that a warning names; the file has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectConfig:
    """Which images the teacher sees and what it is asked."""

    sample: SampleConfig
    teacher: TeacherConfig
    quality: QualityConfig = QualityConfig()
    images: ImageLimits = ImageLimits()
    fetch: FetchConfig = FetchConfig()
    budget: RejectBudget = RejectBudget()


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

    def work(attempt: int) -> NoReturn:
        raise AssertionError(f"attempt {attempt} has no desk")

    return Stage(
        out=out,
        identity={"collect": content_of(config)},
        inputs=input_fingerprints(storage, images),
        index=write_chosen(storage, config.sample, images, storage.sub(out.path)),
        work=work,
        budget=config.budget,
    )


def _asking(stage: Stage, config: CollectConfig, desk: "DeskHandle") -> Stage:
    def work(attempt: int) -> plan.Work:
        return plan.Work(
            actor=AskTeacher,
            kwargs={"desk": desk, "attempt": attempt},
            prepare=_prepare_of(config),
            record=TeacherCaptionRow,
            paid_usd=PaidSoFar(desk),
        )

    return replace(stage, work=work, facts=partial(_facts, desk))


class PaidSoFar:
    """What all runs have paid, as a desk tells it; the last that was told once it is gone."""

    def __init__(self, desk: "DeskHandle") -> None:
        self._desk, self._usd = desk, 0.0

    def __call__(self) -> float:
        """Return dollars."""
        with suppress(RayActorError):  # the job ends by what its rows meet, and says why
            self._usd = float(ray.get(self._desk.spent_usd.remote()))
        return self._usd


def _prepare_of(config: CollectConfig) -> Callable[[pa.Table], pa.Table]:
    encode = Encode(sent=config.teacher.image)
    return partial(prepare, limits=config.images, fetch=config.fetch, encode=encode)


def _facts(desk: "DeskHandle") -> dict[str, Any]:
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
    flow: plan.Flow,
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
    with desk_of(config, endpoint, out=out, where=where, batch=batch or BatchLimits()) as desk:
        stage = _asking(stage, config, desk)
        if retry is not None:
            return retry_rejects(stage, retry, flow=flow, where=where)
        if mode == "batch":
            _ask_in_batches(config, stage.index, desk, where, flow)
        return write_rows(stage, flow=flow, where=where)


def _ask_in_batches(
    config: CollectConfig, index: Storage, desk: "DeskHandle", where: Where, flow: plan.Flow
) -> None:
    """Bring every image to the desk's batches; their answers are then in the ledger."""
    check_cluster(where)
    filesystem, path = index.arrow()
    rows = ray.data.read_parquet(path, filesystem=filesystem, num_cpus=LIGHT_CPUS)
    rows = rows.repartition(target_num_rows_per_block=flow.rows_per_block).map_batches(
        _prepare_of(config),
        batch_size=flow.batch_size,
        batch_format="pyarrow",
        num_cpus=where.decode_cpus,
    )
    for table in rows.iter_batches(batch_size=flow.batch_size, batch_format="pyarrow"):
        good = table.filter(pc.is_valid(table["image"])).select(COLUMNS)
        _get(desk.put_into_batches.remote(good.to_pylist(), 1))
    _get(desk.finish_batches.remote())


@contextmanager
def desk_of(
    config: CollectConfig, endpoint: Endpoint, *, out: Ref, where: Where, batch: BatchLimits
) -> Iterator["DeskHandle"]:
    """Hold the root's ledger and a desk while the block runs.

    However the block ends, short of a kill, what is on its way is waited for and stored.

    Raises:
        LeaseHeld: another collection below this root is running.
    """
    ledger = where.storage.sub(LEDGER)
    # On the driver's node: no other node takes it down with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_concurrency=AT_DESK, scheduling_strategy=here)
    with hold(ledger) as lease:
        desk = remote(TeacherDesk).remote(
            config=config.teacher,
            endpoint=endpoint,
            quality=config.quality,
            batch=batch,
            ledger_root=ledger.root,
            writer=lease.number,
            job=str(out),
        )
        try:
            lost, batches = _get(desk.open.remote())
            _warn_of_lost(lost)
            if batches:  # their images would be asked, and paid, a second time
                _log.warning("waiting for %d batches of an earlier run", batches)
                _get(desk.finish_batches.remote())
            yield desk
        finally:
            try:
                _close(desk, where.storage.sub(out.path))
            finally:
                ray.kill(desk)


def _close(desk: "DeskHandle", home: Storage) -> None:
    """Wait for what is on its way and say what was lost in all runs."""
    try:
        if not _get(desk.is_open.remote()):
            return
        status: DeskStatus = _get(desk.status.remote())
        if status.on_their_way:
            _log.warning("waiting for %d answers on their way", status.on_their_way)
        _get(desk.stop.remote())
        status = _get(desk.status.remote())
    except RayActorError as error:
        _log.warning("the process that asks the teacher is gone: %s", error)
        return
    lost = [asdict(one) for one in status.lost]
    home.put(LOST, (json.dumps(lost, indent=1) + "\n").encode())
    counts = ", ".join(f"{count} {name}" for name, count in sorted(status.outcomes.items()))
    _log.info(
        "%d requests sent (%s), %d answers were there; $%.4f of all runs, of it $%.4f for %d "
        "requests without an answer (%s)",
        status.sent,
        counts or "none",
        status.known,
        status.spent_usd,
        sum(one.usd for one in status.lost),
        len(lost),
        home.uri(LOST),
    )


def _warn_of_lost(lost: list[Lost]) -> None:
    if lost:
        _log.warning(
            "%d requests were on their way when an earlier job ended; their images are asked again "
            "and may be paid twice, $%.4f at most: %s%s",
            len(lost),
            sum(one.usd for one in lost),
            ", ".join(one.row for one in lost[:_NAMED]),
            ", ..." if len(lost) > _NAMED else "",
        )


def _get(answer: "ray.ObjectRef[Any]") -> Any:
    """Get an actor's answer; what it raised on purpose comes as itself."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Sg4vError) else error) from None
