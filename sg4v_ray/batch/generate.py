# SPDX-License-Identifier: Apache-2.0
"""The work actor around an engine: rows with an image in, rows with a text or a reason out.

Ray Data actor. It holds the engine; what is worth testing is in plain functions.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from sg4v_ray.batch.loop_thread import LoopThread
from sg4v_ray.batch.tally import Tally
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.records import Turn
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.storage import Storage
from sg4v_ray.inference.engine import Completion, Generation, Pixels, Request, complete
from sg4v_ray.inference.open import EngineConfig, open_engine
from sg4v_ray.model.conversation import Conversation, TemplateName

MODEL_FOLDER = "model"


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


def judge(text: str, completion: Completion, *, cut_off: Literal["reject", "keep"]) -> Answer:
    """Turn a completion into a row's outcome."""
    size, reason = len(completion.token_ids), completion.finish_reason
    if reason == "length" and cut_off == "reject":
        return Answer(None, size, reason, Reject.CUT_OFF.value, f"after {size} tokens: {text}")
    if not text and cut_off == "reject":
        return Answer(None, size, reason, Reject.EMPTY_TEXT.value, "the model ended at once")
    return Answer(text, size, reason, None, None)


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
        tally: "ray.actor.ActorHandle[Tally]",
    ) -> None:
        self._config, self._size, self._text_column = config, image_size, text_column
        self._tally = tally
        folder = model.localise()
        self._conversation = Conversation.open(folder, config.template)
        self._loop = LoopThread("engine")
        self._engine = open_engine(engine, folder, threads=threads)
        self._loop.run(self._engine.start())
        tally.ready.remote()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Answer every row that has an image; pass on the reason of every row that has none."""
        rows = batch.to_pylist()
        futures = [self._loop.submit(self._answer(row)) for row in rows]
        answers = await asyncio.gather(*(asyncio.wrap_future(one) for one in futures))
        self._tally.add.remote(
            len(rows),
            sum(one.num_tokens for one in answers),
            [one.reject for one in answers if one.reject],
        )
        yield with_answers(batch, answers, text_column=self._text_column)

    async def _answer(self, row: dict[str, Any]) -> Answer:
        if row["reject"] is not None:
            return Answer(None, 0, None, row["reject"], row["reject_detail"])
        question = self._config.instruction or row["text"]
        prompt = self._conversation.prompt([Turn(role="user", text=question)], num_images=1)
        request = Request(
            token_ids=prompt.token_ids,
            images=(_pixels(row["image"], self._size),),
            generation=self._config.generation,
        )
        completion = await complete(self._engine, request)
        text = self._conversation.decode(completion.token_ids)
        return judge(text, completion, cut_off=self._config.cut_off)


def _pixels(data: bytes, size: int) -> Pixels:
    return np.frombuffer(data, np.uint8).reshape(size, size, 3)
