# SPDX-License-Identifier: Apache-2.0
"""HFEngine: transformers' own `generate`, the reference and the default without a GPU.

A batch is what waits when the last one ends. Rows finish, stream and abort one by one, but the
place of a finished row stays empty until its batch ends; VLLMEngine refills it at once. The only
engine with beams.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sg4v_ray.core.errors import EngineDead, EngineError
from sg4v_ray.inference.engine import Delta, EngineStats, FinishReason, Generation, Request
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.inference.prompt import PromptRules
from sg4v_ray.inference.row_sampling import RowSampler
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.model.weights import load


@dataclass(slots=True, eq=False)
class _Row:
    """One request. `made` and `done` belong to the decoding thread, `aborted` to the loop."""

    request: Request
    limit: int
    deltas: asyncio.Queue[Delta | EngineError] = field(default_factory=asyncio.Queue)
    made: int = 0
    done: bool = False
    aborted: bool = False

    @property
    def kind(self) -> tuple[Generation, int, int] | None:
        """Rows of equal kind share a batch: all without beams, and beams of equal settings.

        Beams that sample draw from one generator, so what shares their batch would change what
        they say: each runs alone.
        """
        how = self.request.generation
        if how.num_beams == 1:
            return None
        return (replace(how, seed=0), self.limit, id(self) if how.temperature else 0)


class HFEngine:
    """A model in this process, decoded by one thread."""

    def __init__(self, config: EngineConfig, model: Path, *, threads: int) -> None:
        self.capacity = config.capacity
        self._config = config
        self._folder = model
        self._threads = threads
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._waiting: deque[_Row] = deque()
        self._running: tuple[_Row, ...] = ()
        self._steps = 0
        self._open = False
        self._arrived = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model; see `Engine.start`."""
        if self._open:
            return
        self._rules = PromptRules.read(self._folder, max_model_len=self._config.max_model_len)
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf-engine")
        try:
            await self._loop.run_in_executor(self._thread, self._load)
            self._open = True
        finally:
            if not self._open:
                self._thread.shutdown(wait=False)
        self._serving = asyncio.create_task(self._serve())

    def _load(self) -> None:
        torch.set_num_threads(self._threads)
        self._model = load(self._folder, dtype=self._config.dtype).to(self._device)
        # Whatever the folder recommends must not mix with what a request asks for.
        self._model.generation_config = GenerationConfig(
            eos_token_id=self._rules.eos_token, pad_token_id=self._rules.pad_token
        )
        self._pixels = PixelMaker.open(self._folder)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield a delta a decode step, with beams one at the end; see `Engine.generate`."""
        if not self._open:
            raise EngineError("the engine is not running; call start() first")
        row = _Row(request, self._rules.check(request))
        self._waiting.append(row)
        self._arrived.set()
        try:
            while True:
                delta = await row.deltas.get()
                if isinstance(delta, EngineError):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            row.aborted = True
            with suppress(ValueError):
                self._waiting.remove(row)

    def stats(self) -> EngineStats:
        """Return what the engine does now."""
        running = sum(not row.done for row in self._running)
        return EngineStats(running, len(self._waiting), self._steps)

    async def close(self) -> None:
        """Abort what runs and free the model; a closed engine may be started again."""
        if self._serving is None:
            return
        self._open = False
        self._arrived.set()
        for row in (*self._running, *self._waiting):
            row.aborted = True
            row.deltas.put_nowait(EngineError("the engine was closed while the request ran"))
        self._waiting.clear()
        await self._serving
        self._serving = None
        self._thread.shutdown()
        del self._model, self._pixels

    async def _serve(self) -> None:
        while self._open:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._running = self._take()
            batch = self._loop.run_in_executor(self._thread, self._decode, self._running)
            await asyncio.wait([batch])
            if error := batch.exception():
                # After most errors of a GPU every later call of this process fails as well.
                kind = EngineError if self._device.type == "cpu" else EngineDead
                for row in self._running:
                    row.deltas.put_nowait(kind(f"decoding failed: {error}"))
            self._running = ()

    def _take(self) -> tuple[_Row, ...]:
        """Remove from the queue what the next batch decodes: as many of the first's kind as fit."""
        kind = self._waiting[0].kind
        beams = self._waiting[0].request.generation.num_beams
        fit = [row for row in self._waiting if row.kind == kind][: max(1, self.capacity // beams)]
        for row in fit:
            self._waiting.remove(row)
        return tuple(fit)

    @torch.inference_mode()
    def _decode(self, rows: tuple[_Row, ...]) -> None:
        """Run one batch to its end, on the decoding thread."""
        ids_BT, mask_BT = self._pad([self._rules.expand(row.request.token_ids) for row in rows])
        images = [image for row in rows for image in row.request.images]
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
        if images:
            inputs["pixel_values"] = self._pixels(images).to(self._device, self._model.dtype)
        if rows[0].kind is None:
            self._model.generate(
                **inputs,
                generation_config=self._decoding(max(row.limit for row in rows)),
                logits_processor=LogitsProcessorList(
                    [RowSampler([row.request.generation for row in rows], mask_BT=mask_BT)]
                ),
                stopping_criteria=StoppingCriteriaList([_Stream(self, rows)]),
            )
        else:
            self._beams(rows, inputs)

    def _beams(self, rows: tuple[_Row, ...], inputs: dict[str, Tensor]) -> None:
        """Decode with beams; a row whose beams sample comes alone, with its own seed."""
        how, limit = rows[0].request.generation, rows[0].limit
        config = self._decoding(limit)
        config.num_beams = how.num_beams
        config.repetition_penalty = how.repetition_penalty
        if how.temperature > 0:
            config.do_sample, config.temperature, config.top_p = True, how.temperature, how.top_p
        with torch.random.fork_rng():
            torch.manual_seed(how.seed)
            whole_BT = self._model.generate(
                **inputs,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_Steps(self, rows)]),
            )
        finished: list[tuple[_Row, Delta]] = []
        for row, tokens in zip(
            rows, whole_BT[:, inputs["input_ids"].shape[1] :].tolist(), strict=True
        ):
            made = tokens[:limit]
            reason: FinishReason = "length"
            if self._rules.eos_token in made:
                made, reason = made[: made.index(self._rules.eos_token) + 1], "stop"
            row.done = True
            finished.append((row, Delta(tuple(made), reason)))
        self._loop.call_soon_threadsafe(_deliver, finished)

    def _decoding(self, limit: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=self._rules.eos_token,
            pad_token_id=self._rules.pad_token,
        )

    def _pad(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Left-pad to (B, T); the mask is False on padding. Positions follow from the mask."""
        longest = max(map(len, prompts))
        ids = [[self._rules.pad_token] * (longest - len(one)) + one for one in prompts]
        mask = [[False] * (longest - len(one)) + [True] * len(one) for one in prompts]
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)


class _Steps(StoppingCriteria):
    """Counts decode steps, and ends a batch that nobody waits for."""

    def __init__(self, engine: HFEngine, rows: tuple[_Row, ...]) -> None:
        self._engine = engine
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._engine._steps += 1
        for row in self._rows:
            row.done = row.aborted
        ended = all(row.done for row in self._rows)
        return torch.full((len(input_ids),), ended, device=input_ids.device)


class _Stream(StoppingCriteria):
    """Sends every row's new token to the loop, and says which rows have ended."""

    def __init__(self, engine: HFEngine, rows: tuple[_Row, ...]) -> None:
        self._engine = engine
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        engine = self._engine
        engine._steps += 1
        new: list[tuple[_Row, Delta]] = []
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.done:
                continue
            row.made += 1
            reason: FinishReason | None = None
            if token == engine._rules.eos_token:
                reason = "stop"
            elif row.made == row.limit:
                reason = "length"
            row.done = reason is not None or row.aborted
            new.append((row, Delta((token,), reason)))
        engine._loop.call_soon_threadsafe(_deliver, new)
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)


def _deliver(new: list[tuple[_Row, Delta]]) -> None:
    for row, delta in new:
        row.deltas.put_nowait(delta)
