# SPDX-License-Identifier: Apache-2.0
"""Collect captions from the teacher.

images@v -> choose by source -> decode -> teacher -> teacher-captions@v

Runs on the same exactly-once plan as bulk captioning, so a killed collection pays again only for
the answers of blocks that were not yet committed.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from sg4v_ray.batch import plan
from sg4v_ray.batch.generate import Answer, with_answers
from sg4v_ray.batch.loop_thread import LoopThread
from sg4v_ray.batch.pixels import TeacherPng, add_images
from sg4v_ray.batch.stage import Stage, input_fingerprints, write_rows
from sg4v_ray.batch.tally import Tally, keep_beating
from sg4v_ray.captions.prompts import prompt
from sg4v_ray.captions.teacher import Endpoint, Teacher, TeacherConfig
from sg4v_ray.core.artifact import Manifest, Ref, find
from sg4v_ray.core.config import content_of, fingerprint
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import CaptionRow, ImageRow
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.rows import put_rows, read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.inference.engine import EngineStats


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectConfig:
    """Which images the teacher sees and what it is asked."""

    sources: tuple[str, ...]
    """Names of the sources whose images are sent."""
    teacher: TeacherConfig
    images: ImageLimits = ImageLimits()
    fetch: FetchConfig = FetchConfig()
    budget: RejectBudget = RejectBudget()

    def __post_init__(self) -> None:
        prompt(self.teacher.prompt)


class AskTeacher:
    """Ray Data actor: one client of the teacher, many requests in flight."""

    def __init__(
        self,
        *,
        config: TeacherConfig,
        endpoint: Endpoint,
        tally: "ray.actor.ActorHandle[Tally]",
    ) -> None:
        self._tally, self._loop = tally, LoopThread("teacher")
        text = prompt(config.prompt).text
        self._teacher = Teacher(config, endpoint, key=endpoint.key(), prompt=text)
        self._present = self._asking = 0
        self._slots = asyncio.Semaphore(endpoint.max_in_flight)
        self._name = str(ray.get_runtime_context().get_actor_id())
        self._loop.submit(keep_beating(tally, self._name, self._stats))
        tally.ready.remote(self._name)

    def _stats(self) -> EngineStats:
        """Requests on their way to the teacher and before it, as an engine would tell them."""
        return EngineStats(
            running=self._asking, waiting=self._present - self._asking, decode_steps=0
        )

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Ask for every row that has an image; pass on the reason of every row that has none."""
        futures = [self._loop.submit(self._answer(row)) for row in batch.to_pylist()]
        answers = await asyncio.gather(*(asyncio.wrap_future(one) for one in futures))
        self._tally.finish.remote(
            self._name,
            [],
            rows=len(answers),
            tokens=sum(one.num_tokens for one in answers),
            rejects=[one.reject for one in answers if one.reject],
            engine_s=0.0,
        )
        yield with_answers(batch, answers, text_column="text")

    async def _answer(self, row: dict[str, Any]) -> Answer:
        if row["reject"] is not None:
            return Answer(None, 0, None, row["reject"], row["reject_detail"])
        self._present += 1
        try:
            async with self._slots:
                self._asking += 1
                try:
                    return await self._teacher.caption(row["image"])
                finally:
                    self._asking -= 1
        finally:
            self._present -= 1


def prepare(
    table: pa.Table, *, limits: ImageLimits, encode: TeacherPng, fetch: FetchConfig
) -> pa.Table:
    """Keep what a caption row needs, and add the image as it is sent."""
    kept = table.select(["id", "source", "uri"])
    return add_images(kept, limits=limits, encode=encode, fetch=fetch)


def choose(storage: Storage, config: CollectConfig, images: Ref, home: Storage) -> Storage:
    """Write the rows of the chosen sources as an index of their own, and return its folder.

    The folder is named by what decides its content, so a run under another config writes
    elsewhere before it is refused as drift.
    """
    key = fingerprint([list(config.sources), find(storage, images).fingerprint])
    chosen = [one for one in read_rows(storage, images, ImageRow) if one.source in config.sources]
    if not chosen:
        raise ConfigError(f"{images} has no image of the sources {', '.join(config.sources)}")
    put_rows(home, f"chosen-{key}/part-00000.parquet", ImageRow, chosen)
    return home.sub(f"chosen-{key}")


def run(
    config: CollectConfig,
    *,
    endpoint: Endpoint,
    images: Ref,
    out: Ref,
    where: Where,
    flow: plan.Flow,
) -> Manifest:
    """Write `out`, a teacher caption or a reason for every chosen image; resume if begun.

    Raises:
        ConfigError: the key is missing, or no image is of the chosen sources.
        TeacherBusy, TeacherUnusable: the teacher does not answer; run again to resume.
        TooManyRejects: the reject budget is spent; the rows are kept.
    """
    endpoint.key()
    storage = where.storage
    index = choose(storage, config, images, storage.sub(out.path))
    work = plan.Work(
        actor=AskTeacher,
        kwargs={"config": config.teacher, "endpoint": endpoint},
        prepare=partial(
            prepare,
            limits=config.images,
            fetch=config.fetch,
            encode=TeacherPng(max_side=config.teacher.max_side),
        ),
        record=CaptionRow,
    )
    stage = Stage(
        out=out,
        identity={"collect": content_of(config)},
        inputs=input_fingerprints(storage, images),
        index=index,
        work=lambda attempt: work,
        budget=config.budget,
    )
    return write_rows(stage, flow=flow, where=where)
