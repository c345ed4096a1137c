# SPDX-License-Identifier: Apache-2.0
"""FakeEngine: an engine without weights, for tests of everything that drives an engine.

It batches, streams, waits and aborts like the real ones. What it says depends on nothing but the
prompt's tokens, the pixels and the generation settings, and reads as words of the tokenizer.
"""

import asyncio
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sg4v_ray.core.errors import EngineError
from sg4v_ray.inference.engine import Delta, EngineStats, FinishReason, Request
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.inference.prompt import PromptRules, refuse_beams

MIN_TOKENS: Final = 8
MAX_TOKENS: Final = 64
"""A fake answer has between these many tokens, then an end token."""

_WORD = re.compile("[\u0120\u2581]?[A-Za-z]+")  # either sign stands for a space before a word


@dataclass(slots=True, eq=False)
class _Row:
    """One request: the tokens still to come, and where its deltas go."""

    tokens: deque[int]
    ends: bool
    deltas: asyncio.Queue[Delta | EngineError] = field(default_factory=asyncio.Queue)

    def step(self, count: int) -> bool:
        """Deliver the next tokens; say whether the last was one of them."""
        made = tuple(self.tokens.popleft() for _ in range(min(count, len(self.tokens))))
        last = not self.tokens
        reason: FinishReason | None = None
        if last:
            reason = "stop" if self.ends else "length"
        self.deltas.put_nowait(Delta(made, reason))
        return last


class FakeEngine:
    """An engine whose tokens come from a hash, one a row every `latency_s`."""

    def __init__(self, config: EngineConfig, model: Path) -> None:
        self.capacity = config.capacity
        self._config = config
        self._model = model
        self._running: dict[_Row, None] = {}  # sets that keep their order
        self._waiting: dict[_Row, None] = {}
        self._steps = 0
        self._wake = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the model folder's config.json and, if it is there, tokenizer.json."""
        if self._stepping is not None:
            return
        self._rules = PromptRules.read(self._model, max_model_len=self._config.max_model_len)
        self._words = _printable(self._model, self._rules)
        self._stepping = asyncio.create_task(self._decode())

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield one token a decode step; see `Engine.generate`."""
        if self._stepping is None:
            raise EngineError("the engine is not running; call start() first")
        refuse_beams(request.generation, kind="fake")
        row = self._answer(request, limit=self._rules.check(request))
        poison = self._config.poison
        if poison is not None and any(image.item(0) == poison for image in request.images):
            os._exit(1)
        self._waiting[row] = None
        self._wake.set()
        try:
            while True:
                delta = await row.deltas.get()
                if isinstance(delta, EngineError):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._running.pop(row, None)
            self._waiting.pop(row, None)

    def stats(self) -> EngineStats:
        """Return what the engine does now."""
        return EngineStats(len(self._running), len(self._waiting), self._steps)

    async def close(self) -> None:
        """Abort what runs; a closed engine may be started again."""
        if self._stepping is None:
            return
        self._stepping.cancel()
        with suppress(asyncio.CancelledError):
            await self._stepping
        self._stepping = None
        for row in (*self._running, *self._waiting):
            row.deltas.put_nowait(EngineError("the engine was closed while the request ran"))
        self._running.clear()
        self._waiting.clear()

    async def _decode(self) -> None:
        """Step for ever. A step takes the device's time: a process that is woken late, because the
        machine simulates many devices at once, has not made the device slower.
        """
        clock, latency_s = asyncio.get_running_loop().time, self._config.latency_s
        free_s = clock()
        while True:
            while self._waiting and len(self._running) < self.capacity:
                row = next(iter(self._waiting))
                del self._waiting[row]
                self._running[row] = None
            if not self._running:
                self._wake.clear()
                await self._wake.wait()
                free_s = clock()
                continue
            free_s = max(free_s, clock() - latency_s) + latency_s  # one step late at most
            await asyncio.sleep(free_s - clock())  # stands for a forward pass
            self._steps += 1
            for row in [*self._running]:
                if row.step(self._config.tokens_per_step):
                    del self._running[row]

    def _answer(self, request: Request, *, limit: int) -> _Row:
        how = request.generation
        sampling = (how.temperature, how.top_p, how.seed) if how.temperature else ()
        digest = hashlib.shake_128(repr(request.token_ids).encode())
        for image in request.images:
            digest.update(image.tobytes())
        digest.update(repr((sampling, how.repetition_penalty)).encode())
        drawn = digest.digest(4 * MAX_TOKENS + 4)
        first, *numbers = memoryview(drawn).cast("I").tolist()
        length = MIN_TOKENS + first % (MAX_TOKENS - MIN_TOKENS + 1)
        words, count = self._words, len(self._words)
        tokens = [words[one % count] for one in numbers[:length]]
        tokens.append(self._rules.eos_token)
        return _Row(deque(tokens[:limit]), ends=len(tokens) <= limit)


def _printable(model: Path, rules: PromptRules) -> list[int]:
    """Return the ids to speak with: whole words, or without a tokenizer any plain id."""
    file = model / "tokenizer.json"
    if file.is_file():
        tokenizer = json.loads(file.read_text())
        special = {one["id"] for one in tokenizer.get("added_tokens", ())}
        words = [
            index
            for word, index in tokenizer["model"]["vocab"].items()
            if index not in special and _WORD.fullmatch(word)
        ]
        if words:
            return sorted(words)
    # Below these lie unknown, begin and end, by Llama's custom.
    return [
        one
        for one in range(3, rules.vocab_size)
        if one not in (rules.image_token, rules.pad_token, rules.eos_token)
    ]
