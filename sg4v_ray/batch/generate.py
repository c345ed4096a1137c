# SPDX-License-Identifier: Apache-2.0
"""The work actor around an engine: rows with an image in, rows with a text or a reason out.

Ray Data actor. It holds the engine; what is worth testing is in plain functions.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import ray

from sg4v_ray.batch.loop_thread import LoopThread
from sg4v_ray.batch.strikes import MAX_STRIKES, Gate
from sg4v_ray.batch.tally import Tally, keep_beating
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.config import fingerprint
from sg4v_ray.core.errors import EngineDead
from sg4v_ray.core.images import Rejected
from sg4v_ray.core.records import Turn
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.storage import Storage
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
from sg4v_ray.model.conversation import Conversation, TemplateName

_log = logging.getLogger(__name__)

MODEL_FOLDER = "model"
Accept: TypeAlias = Callable[[str], Rejected | None]
"""Says why a text is no good answer, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model artifact lies and where a node may keep a copy."""

    root: str
    ref: Ref
    cache: str = "~/.cache/sg4v-models"
    """Folder of a node's local disk; not used when the root is local."""

    def localise(self) -> Path:
        """Return the model folder on this node, its checksums verified."""
        storage = Storage(self.root)
        manifest = find(storage, self.ref)
        cache = Path(self.cache)
        path = f"{self.ref.path}/{MODEL_FOLDER}"
        return storage.localise(path, cache=cache, digests=manifest.digests)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """What every row is asked, and how its answer is decoded. Part of identity."""

    template: TemplateName
    generation: Generation
    instruction: str | None
    """The same question for every row, or None to ask each row's own `text` column."""
    cut_off: Literal["reject", "keep"]
    """What becomes of an answer that hit `max_tokens` or is empty. A wrong answer of a model
    under evaluation is its result and no broken row."""


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
    """Replace a batch's image by its answers; the order of rows stays."""
    table = batch.drop_columns(["image", "reject", "reject_detail"])
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


class Generate:
    """Ray Data actor: one engine, many batches of rows in flight."""

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
        tally: "ray.actor.ActorHandle[Tally]",
        accept: Accept | None = None,
    ) -> None:
        self._config, self._size, self._text_column = config, image_size, text_column
        self._attempt, self._accept, self._tally = attempt, accept, tally
        self._key = fingerprint(config)
        self._prompt: tuple[int, ...] | None = None
        self._name = str(ray.get_runtime_context().get_actor_id())
        ray.get(tally.starts.remote(self._name))
        folder = model.localise()
        self._conversation = Conversation.open(folder, config.template)
        self._loop, self._gate = LoopThread("engine"), Gate()
        self._engine: Engine | None = None
        self._loop.submit(keep_beating(tally, self._name, self._stats))
        opened = open_engine(engine, folder, threads=threads)
        self._loop.run(opened.start())
        self._engine = opened
        tally.ready.remote(self._name)

    def _stats(self) -> EngineStats | None:
        return None if self._engine is None else self._engine.stats()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Answer every row that has an image; pass on the reason of every row that has none."""
        rows = batch.to_pylist()
        good = [row["id"] for row in rows if row["reject"] is None]
        suspects = await self._tally.enter.remote(self._name, good) if good else {}
        started_s = time.monotonic()
        # On the engine's own loop, which goes on while Ray's is blocked.
        answers = await asyncio.wrap_future(self._loop.submit(self._outcomes(rows, suspects)))
        self._tally.finish.remote(
            self._name,
            good,
            rows=len(rows),
            tokens=sum(one.num_tokens for one in answers),
            rejects=[one.reject for one in answers if one.reject],
            engine_s=(time.monotonic() - started_s) * len(good),
        )
        yield with_answers(batch, answers, text_column=self._text_column)

    async def _outcomes(self, rows: list[dict[str, Any]], suspects: dict[str, int]) -> list[Answer]:
        """Answer the rows of a batch together, and alone those with which an engine died."""
        together = [row for row in rows if row["id"] not in suspects]
        try:
            async with self._gate.together():
                answers = await asyncio.gather(*map(self._outcome, together))
            by_id = dict(zip((row["id"] for row in together), answers, strict=True))
            for row in rows:
                if row["id"] in suspects:
                    by_id[row["id"]] = await self._suspect(row, suspects[row["id"]])
        except EngineDead as error:
            # Ray restarts an actor whose process ends, and sends it the same rows again.
            _log.error("the engine died and is started again: %s", error)
            os._exit(1)
        return [by_id[row["id"]] for row in rows]

    async def _outcome(self, row: dict[str, Any]) -> Answer:
        if row["reject"] is not None:
            return Answer(None, 0, None, row["reject"], row["reject_detail"])
        return await self._answer(row)

    async def _suspect(self, row: dict[str, Any], strikes: int) -> Answer:
        """Answer a row alone, unless that has killed an engine already."""
        if strikes >= MAX_STRIKES:
            detail = "an engine died twice while it had this image, the second time only this one"
            return Answer(None, 0, None, Reject.CRASHES_ENGINE.value, detail)
        async with self._gate.alone():
            await self._tally.enter_alone.remote(self._name, row["id"])
            answer = await self._answer(row)
            # Now, not with its batch: the next one alone may be the culprit.
            await self._tally.leave.remote(self._name, [row["id"]])
            return answer

    async def _answer(self, row: dict[str, Any]) -> Answer:
        assert self._engine is not None
        request = Request(
            token_ids=self._ask(row),
            images=(_pixels(row["image"], self._size),),
            generation=self._generation(row["id"]),
        )
        completion = await complete(self._engine, request)
        text = self._conversation.decode(completion.token_ids)
        return judge(text, completion, cut_off=self._config.cut_off, accept=self._accept)

    def _ask(self, row: dict[str, Any]) -> tuple[int, ...]:
        """Return the prompt of a row; the same question for all rows is tokenised once."""
        if self._prompt is not None:
            return self._prompt
        turns = [Turn(role="user", text=self._config.instruction or row["text"])]
        token_ids = self._conversation.prompt(turns, num_images=1).token_ids
        if self._config.instruction is not None:
            self._prompt = token_ids
        return token_ids

    def _generation(self, key: str) -> Generation:
        """Return how a row is decoded: as the config says, with a seed of its own."""
        how = self._config.generation
        if not how.temperature:
            return how
        return replace(how, seed=row_seed(key, attempt=self._attempt, config=self._key))


def _pixels(data: bytes, size: int) -> Pixels:
    return np.frombuffer(data, np.uint8).reshape(size, size, 3)
