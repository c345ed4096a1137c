# SPDX-License-Identifier: Apache-2.0
"""The Ray side of asking: one actor that holds the desk, and the pool actors that bring it rows.

The desk is one process, on the driver's node: limits and money are of the job and not of a
worker, and what is on its way outlives a pool that is built again. Pool actors only wait.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import ray
from ray.exceptions import RayActorError
from ray.util.metrics import Counter as MetricCounter

from sg4v_ray.captions.batches import BatchCounts, Batches, BatchLimits
from sg4v_ray.captions.charges import Ask
from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.ledger import Ledger, Lost, Paid
from sg4v_ray.captions.prompts import BASE_2026_11, Prompt, prompt
from sg4v_ray.captions.quality import QualityConfig, judge
from sg4v_ray.captions.teacher import Endpoint, Reply, Teacher, TeacherConfig
from sg4v_ray.core import observe
from sg4v_ray.core.errors import TeacherBusy
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.part_actor import PartActor, without_images
from sg4v_ray.inference.engine import EngineStats

AT_DESK: Final = 10_000
"""Calls that may wait for this actor: far more than all pool actors have rows in flight."""
COLUMNS: Final = ("id", "image", "image_sha256", "prompt")


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    """The outcome columns of one row."""

    text: str | None
    num_tokens: int
    finish_reason: str | None
    reject: str | None
    reject_detail: str | None
    prompt: str
    prompt_sha256: str
    prompt_tokens: int
    usd: float


@dataclass(frozen=True, slots=True)
class DeskStatus:
    """What a desk has done, in numbers."""

    spent_usd: float
    """Of all runs of this artifact."""
    on_their_way: int
    sent: int
    known: int
    outcomes: dict[str, int]
    batches: BatchCounts
    lost: tuple[Lost, ...]
    """Of all runs of this artifact."""


class TeacherDesk:
    """Ray actor: the desk of one job."""

    def __init__(
        self,
        *,
        config: TeacherConfig,
        endpoint: Endpoint,
        quality: QualityConfig,
        batch: BatchLimits,
        ledger_root: str,
        writer: int,
        job: str,
    ) -> None:
        observe.set_up_logging()
        self._config, self._endpoint, self._quality = config, endpoint, quality
        self._limits, self._root, self._writer, self._job = batch, ledger_root, writer, job
        self._metrics = Outcomes(job)

    async def open(self) -> list[Lost]:
        """Open the ledger and close what earlier jobs left open.

        Here and not at construction, where Ray hides what is raised.

        Returns:
            The requests that may be paid again.

        Raises:
            ArtifactCorrupt: the ledger is damaged.
            ConfigError: there is no key.
        """
        endpoint = self._endpoint
        teacher = Teacher(self._config, endpoint, key=endpoint.key())
        self._ledger = await asyncio.to_thread(Ledger, Storage(self._root), writer=self._writer)
        self._desk = Desk(teacher, endpoint, self._ledger, job=self._job)
        self._batches = Batches(self._desk, teacher, endpoint, self._limits)
        lost = await self._ledger.lose_what_was_on_its_way()
        self._desk.purse.spent_usd = self._ledger.spent_usd[self._job]
        await self._batches.resume()
        return lost

    def is_open(self) -> bool:
        """Say whether `open` has come to its end."""
        return hasattr(self, "_batches")

    async def caption(
        self, row: str, image: bytes, image_sha256: str, prompt_name: str, attempt: int
    ) -> TeacherAnswer:
        """Ask for one caption; a refused one once more, with the base prompt.

        Raises as `Desk.ask`.
        """
        usd = 0.0
        ask = Ask(row, image, image_sha256, prompt(prompt_name), attempt)
        while True:
            found = await self._desk.ask(ask)
            reply, usd = (found.reply, usd + found.usd) if isinstance(found, Paid) else (found, usd)
            answer = answer_of(reply, ask.prompt, self._quality, usd)
            if answer.reject != Reject.REFUSED or ask.prompt == BASE_2026_11:
                self._metrics.add(self._desk)
                return answer
            ask = Ask(row, image, image_sha256, BASE_2026_11, attempt)

    async def put_into_batches(self, rows: list[dict[str, Any]], attempt: int) -> None:
        """Put rows into the next batches; see `Batches.add`."""
        for row in rows:
            await self._batches.add(
                Ask(row["id"], row["image"], row["image_sha256"], prompt(row["prompt"]), attempt)
            )

    async def finish_batches(self) -> None:
        """Send the last batch and wait until all have ended."""
        await self._batches.finish()
        self._metrics.add(self._desk)

    def status(self) -> DeskStatus:
        """Return the numbers so far."""
        counts, job = self._desk.counts, self._desk.job
        return DeskStatus(
            spent_usd=self._ledger.spent_usd[job],
            on_their_way=self._desk.on_their_way,
            sent=counts.sent,
            known=counts.known,
            outcomes=dict(counts.outcomes),
            batches=self._batches.counts(),
            lost=tuple(one for one in self._ledger.lost if one.job == job),
        )

    def spent_usd(self) -> float:
        """Return what all runs of this artifact have cost."""
        return float(self._ledger.spent_usd[self._desk.job])

    async def stop(self) -> None:
        """Send nothing more, and return when what was on its way is stored."""
        await self._desk.stop()


class Outcomes:
    """Exports what becomes of requests to Prometheus."""

    def __init__(self, job: str) -> None:
        metric = observe.TEACHER_OUTCOMES
        self._counter = MetricCounter(metric.name, metric.description, metric.labels)
        self._labels, self._told = {"artifact": job}, dict[str, int]()

    def add(self, desk: Desk) -> None:
        """Tell what came since the last time."""
        for outcome, count in desk.counts.outcomes.items():
            if more := count - self._told.get(outcome, 0):
                self._counter.inc(more, {**self._labels, "outcome": outcome})
                self._told[outcome] = count


def answer_of(reply: Reply, asked: Prompt, quality: QualityConfig, usd: float) -> TeacherAnswer:
    """Turn a reply into a row's outcome; the quality gate may still reject its text."""
    text, reject, detail = reply.text, reply.reject, reply.detail
    if text is not None and (no := judge(text, instruction=asked.text, config=quality)):
        text, reject, detail = None, no.reason.value, no.detail
    return TeacherAnswer(
        text=text,
        num_tokens=reply.completion_tokens,
        finish_reason=reply.finish_reason,
        reject=reject,
        reject_detail=detail,
        prompt=asked.name,
        prompt_sha256=asked.sha256,
        prompt_tokens=reply.prompt_tokens,
        usd=usd,
    )


class AskTeacher(PartActor):
    """Work actor that sends rows to the desk and waits for their answers."""

    def __init__(
        self, *, desk: "ray.actor.ActorHandle[TeacherDesk]", attempt: int, **part_actor: Any
    ) -> None:
        self._desk, self._attempt, self._waiting = desk, attempt, 0
        super().__init__(**part_actor)

    def stats(self) -> EngineStats:
        """Return the rows that wait for an answer, as an engine reports its requests."""
        return EngineStats(running=self._waiting, waiting=0, decode_steps=0)

    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        """Ask about every row that has an image; keep the reject of every row that has none."""

        async def answer(row: dict[str, Any]) -> TeacherAnswer:
            found = await self._answer(row)
            release_row()
            return found

        plain = rows.to_pylist()
        rows = without_images(rows)
        answers = await asyncio.gather(*map(answer, plain))
        self._progress.finish.remote(
            self._name,
            [],
            rows=len(answers),
            tokens=sum(one.num_tokens for one in answers),
            rejects=[one.reject for one in answers if one.reject],
            engine_s=0.0,
        )
        return with_answers(rows, answers)

    async def _answer(self, row: dict[str, Any]) -> TeacherAnswer:
        if row["reject"] is not None:
            return unasked(prompt(row["prompt"]), row["reject"], row["reject_detail"])
        self._waiting += 1
        try:
            answer: TeacherAnswer = await self._desk.caption.remote(
                *(row.pop(name) for name in COLUMNS), self._attempt
            )
            return answer
        except RayActorError as error:
            raise TeacherBusy(
                "the process that asks the teacher died; run again: answers that it stored are "
                "not paid twice, those on their way are charged in full"
            ) from error
        finally:
            self._waiting -= 1


def unasked(asked: Prompt, reject: str, detail: str | None) -> TeacherAnswer:
    """Return the outcome of a row whose image could not be sent."""
    return TeacherAnswer(
        text=None,
        num_tokens=0,
        finish_reason=None,
        reject=reject,
        reject_detail=detail,
        prompt=asked.name,
        prompt_sha256=asked.sha256,
        prompt_tokens=0,
        usd=0.0,
    )


_TYPES: Final = {
    "text": pa.string(),
    "num_tokens": pa.int64(),
    "finish_reason": pa.string(),
    "reject": pa.string(),
    "reject_detail": pa.string(),
    "prompt": pa.string(),
    "prompt_sha256": pa.string(),
    "prompt_tokens": pa.int64(),
    "usd": pa.float64(),
}


def with_answers(batch: pa.Table, answers: list[TeacherAnswer]) -> pa.Table:
    """Replace a batch's prompts and rejects by its answers; the order of rows stays."""
    table = batch.drop_columns(["reject", "reject_detail", "prompt"])
    for name, kind in _TYPES.items():
        table = table.append_column(name, pa.array([getattr(one, name) for one in answers], kind))
    return table
