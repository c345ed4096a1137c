# SPDX-License-Identifier: Apache-2.0
"""The work actor around an engine: rows with an image in, rows with a text or a reject out."""

import asyncio
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import ray

from sg4v_ray.core.errors import EngineDead, EngineError
from sg4v_ray.core.identity import fingerprint_of
from sg4v_ray.core.images import Rejected
from sg4v_ray.core.records import Turn
from sg4v_ray.core.rejects import Reject
from sg4v_ray.exactly_once.config import GenerateConfig, ModelSource
from sg4v_ray.exactly_once.part_actor import PartActor, without_images
from sg4v_ray.exactly_once.poison import SharedExclusiveLock, Suspicion, run_tracked
from sg4v_ray.exactly_once.progress import ProgressActor
from sg4v_ray.inference.engine import (
    Completion,
    Engine,
    EngineStats,
    Generation,
    Pixels,
    Request,
    complete,
)
from sg4v_ray.inference.open import EngineConfig, open_engine
from sg4v_ray.model.conversation import Conversation

_log = logging.getLogger(__name__)

Accept: TypeAlias = Callable[[str], Rejected | None]
"""Returns the reject of a text that is not acceptable, or None."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome columns of one row."""

    text: str | None
    num_tokens: int
    finish_reason: str | None
    reject: str | None
    reject_detail: str | None


def judge(
    text: str,
    completion: Completion,
    *,
    cut_off: Literal["reject", "keep"],
    accept: Accept | None = None,
) -> Answer:
    """Turn a completion into a row's outcome."""
    size, reason = len(completion.token_ids), completion.finish_reason
    if reason == "length" and cut_off == "reject":
        return Answer(None, size, reason, Reject.CUT_OFF.value, f"after {size} tokens: {text}")
    if not text and cut_off == "reject":
        return Answer(None, size, reason, Reject.EMPTY_TEXT.value, "the model ended at once")
    if accept is not None and (refused := accept(text)) is not None:
        return Answer(None, size, reason, refused.reason.value, refused.detail)
    return Answer(text, size, reason, None, None)


def row_seed(key: str, *, attempt: int, config: str) -> int:
    """Return the sampling seed of a row, 0 to 2**63 - 1.

    It depends on nothing but the row, the attempt at it and the config, so the order of rows,
    their batches, restarts and the number of actors change no answer.
    """
    digest = hashlib.sha256(f"{config}/{attempt}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def with_answers(batch: pa.Table, answers: list[Answer], *, text_column: str) -> pa.Table:
    """Replace a batch's rejects by its answers; the order of rows stays."""
    table = batch.drop_columns(["reject", "reject_detail"])
    columns = {
        text_column: pa.array([one.text for one in answers], pa.string()),
        "num_tokens": pa.array([one.num_tokens for one in answers], pa.int64()),
        "finish_reason": pa.array([one.finish_reason for one in answers], pa.string()),
        "reject": pa.array([one.reject for one in answers], pa.string()),
        "reject_detail": pa.array([one.reject_detail for one in answers], pa.string()),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


class Generate(PartActor):
    """Work actor with one engine; many slices of rows are in process at once."""

    def __init__(
        self,
        *,
        model: ModelSource,
        engine: EngineConfig,
        config: GenerateConfig,
        image_size: int,
        text_column: str,
        threads: int,
        attempt: int,
        accept: Accept | None = None,
        **part_actor: Any,
    ) -> None:
        self._config, self._size, self._text_column = config, image_size, text_column
        self._attempt, self._accept = attempt, accept
        self._key = fingerprint_of(config)
        self._prompt: tuple[int, ...] | None = None
        self._engine: Engine | None = None
        self._lock = SharedExclusiveLock()
        self._model, self._engine_config, self._threads = model, engine, threads
        super().__init__(**part_actor)
        self._tracker = _TrackerCalls(self._progress, self._name)

    async def load(self) -> None:
        """Copy the model to this node and start the engine."""
        engine = await asyncio.to_thread(self._open_engine)
        await engine.start()
        self._engine = engine

    def _open_engine(self) -> Engine:
        folder = self._model.localise()
        self._conversation = Conversation.open(folder, self._config.template)
        return open_engine(self._engine_config, folder, threads=self._threads)

    def stats(self) -> EngineStats | None:
        """Return the load of the engine; None while it loads."""
        return None if self._engine is None else self._engine.stats()

    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        """Answer every row with an image; keep the reject of every row without one."""
        plain = rows.to_pylist()
        rows = without_images(rows)
        started_s = time.monotonic()
        good = {row["id"]: row for row in plain if row["reject"] is None}
        found = await run_tracked(
            good,
            run=functools.partial(self._answer_all, release_row=release_row),
            condemn=_condemned,
            tracker=self._tracker,
            lock=self._lock,
        )
        answers = [found.get(row["id"]) or _rejected(row) for row in plain]
        self._progress.finish.remote(
            self._name,
            self._tracker.take_finished(),
            rows=len(plain),
            tokens=sum(one.num_tokens for one in answers),
            rejects=[one.reject for one in answers if one.reject],
            engine_s=(time.monotonic() - started_s) * len(plain),
        )
        return with_answers(rows, answers, text_column=self._text_column)

    async def _answer_all(
        self, rows: Sequence[dict[str, Any]], *, release_row: Callable[[], None]
    ) -> list[Answer]:
        """Answer rows together. A dead engine ends this process, and Ray starts another one."""

        async def answer(row: dict[str, Any]) -> Answer:
            found = await self._answer(row)
            self._tracker.finished.append(row["id"])
            release_row()
            return found

        try:
            return await asyncio.gather(*map(answer, rows))
        except EngineDead as error:
            _log.error("the engine died and is started again: %s", error)
            os._exit(1)

    async def _answer(self, row: dict[str, Any]) -> Answer:
        assert self._engine is not None
        request = Request(
            token_ids=self._ask(row),
            images=(_pixels(row.pop("image"), self._size),),
            generation=self._generation(row["id"]),
        )
        try:
            completion = await complete(self._engine, request)
        except EngineDead:
            raise
        except EngineError as error:
            return Answer(None, 0, None, Reject.ENGINE_ERROR.value, str(error))
        finally:
            del request
        text = self._conversation.decode(completion.token_ids)
        return judge(text, completion, cut_off=self._config.cut_off, accept=self._accept)

    def _ask(self, row: dict[str, Any]) -> tuple[int, ...]:
        """Return the prompt of a row; a question that all rows share is tokenised once."""
        if self._prompt is not None:
            return self._prompt
        turns = [Turn(role="user", text=self._config.instruction or row["text"])]
        token_ids = self._conversation.prompt(turns, num_images=1).token_ids
        if self._config.instruction is not None:
            self._prompt = token_ids
        return token_ids

    def _generation(self, key: str) -> Generation:
        """Return the decoding of a row: that of the config, with a seed of its own."""
        how = self._config.generation
        if not how.temperature:
            return how
        return replace(how, seed=row_seed(key, attempt=self._attempt, config=self._key))


class _TrackerCalls:
    """The calls of one engine to the crash tracker in the progress actor."""

    def __init__(self, progress: "ray.actor.ActorHandle[ProgressActor]", engine: str) -> None:
        self._progress, self._engine = progress, engine
        self.finished: list[str] = []
        """Rows that left the engine alive since the last report."""

    def take_finished(self) -> list[str]:
        """Return the finished rows, for a report."""
        finished, self.finished = self.finished, []
        return finished

    async def enter(self, ids: list[str]) -> dict[str, Suspicion]:
        found: dict[str, Suspicion] = await self._progress.enter.remote(
            self._engine, ids, self.take_finished()
        )
        return found

    async def enter_probe(self, ids: list[str]) -> None:
        await self._progress.enter_probe.remote(self._engine, ids)

    async def leave(self, ids: list[str]) -> None:
        await self._progress.leave.remote(self._engine, ids)

    async def suspicion(self, ids: list[str]) -> dict[str, Suspicion]:
        found: dict[str, Suspicion] = await self._progress.suspicion.remote(ids)
        return found


def _rejected(row: dict[str, Any]) -> Answer:
    return Answer(None, 0, None, row["reject"], row["reject_detail"])


def _condemned(row: dict[str, Any], detail: str) -> Answer:
    return Answer(None, 0, None, Reject.CRASHES_ENGINE.value, detail)


def _pixels(data: bytes, size: int) -> Pixels:
    return np.frombuffer(data, np.uint8).reshape(size, size, 3)
