# SPDX-License-Identifier: Apache-2.0
"""Loads on several servers in turn, each request with the same photograph for all of them."""

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

from jobs import _bench_site as site
from jobs._load_client import Ask, asking, body, closed_loop, open_loop
from jobs._load_samples import Sample, Slo, percentiles_ms, summary
from jobs._load_servers import Side
from sg4v_ray.core.errors import Sg4vError

_FIRST_TOKENS: Final = 8
"""Length of an answer where the first token is what counts."""
Load = Callable[[Ask, Sequence[bytes]], Awaitable[list[Sample]]]


class Loads:
    """Sends loads to the servers in turn and notes what they were like."""

    def __init__(self, sides: Sequence[Side], photos: Sequence[Path], slo: Slo) -> None:
        self.loads: list[dict[str, Any]] = []
        self._sides, self._slo = sides, slo
        self._photos = iter(enumerate(photos))
        self.asks: dict[str, Ask] = {}

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator["Loads", None]:
        """Keep connections to all servers."""
        async with AsyncExitStack() as stack:
            for side in self._sides:
                opened = await stack.enter_async_context(asking(side.endpoint))
                self.asks[side.endpoint.name] = opened
            yield self

    async def warm_up(self, clients: int) -> None:
        """Let every server load what it loads with its first requests."""
        photos = self._next(clients)
        found = [
            await closed_loop(
                self.asks[one.endpoint.name],
                [body(one.endpoint.model, photo, _FIRST_TOKENS) for _, photo in photos],
                clients=clients,
            )
            for one in self._sides
        ]
        self._check(found)

    async def closed(self, number: int, *, requests: int, clients: int) -> None:
        """Send pass `number` of the closed loop to each server; who is first alternates."""

        async def load(ask: Ask, bodies: Sequence[bytes]) -> list[Sample]:
            return await closed_loop(ask, bodies, clients=clients)

        photos = self._next(requests)
        found = [
            await self._load("closed", side, photos, load)
            for side in self._sides[:: (1, -1)[number % 2]]
        ]
        self._check(found)

    async def open(self, due_s: Sequence[float]) -> None:
        """Send the open loop to each server."""

        async def load(ask: Ask, bodies: Sequence[bytes]) -> list[Sample]:
            return await open_loop(ask, bodies, due_s)

        photos = self._next(len(due_s))
        for side in self._sides:
            await self._load("open", side, photos, load)

    async def single(self, pairs: int) -> dict[str, list[Sample]]:
        """Send each request to one server after the other, with nothing else under way."""
        found: dict[str, list[Sample]] = {side.endpoint.name: [] for side in self._sides}
        for number, photo in self._next(pairs):
            for side in self._sides[:: (1, -1)[number % 2]]:
                data = body(side.endpoint.model, photo, _FIRST_TOKENS)
                ask = self.asks[side.endpoint.name]
                found[side.endpoint.name].append(await ask(data, time.monotonic()))
        self._check(list(found.values()))
        for name, samples in found.items():
            ttft_ms = percentiles_ms([one.ttft_s for one in samples])
            self._note({"load": "single", "server": name, "ttft_ms": ttft_ms})
        return found

    async def _load(
        self,
        name: str,
        side: Side,
        photos: Sequence[tuple[int, Path]],
        load: Load,
    ) -> list[Sample]:
        bodies = [
            body(side.endpoint.model, photo, site.num_tokens(f"{number:07d}"))
            for number, photo in photos
        ]
        before = [one.cpu_s() for one in self._sides]
        began_s = time.monotonic()
        samples = await load(self.asks[side.endpoint.name], bodies)
        seconds = time.monotonic() - began_s
        used = [_cores(one, then, seconds) for one, then in zip(self._sides, before, strict=True)]
        cores = {one.endpoint.name: each for one, each in zip(self._sides, used, strict=True)}
        figures = summary(samples, seconds, self._slo)
        self._note({"load": name, "server": side.endpoint.name, **figures, "cores": cores})
        return samples

    def _next(self, count: int) -> list[tuple[int, Path]]:
        return list(islice(self._photos, count))

    def _note(self, figures: dict[str, Any]) -> None:
        self.loads.append(figures)
        print(json.dumps({key: one for key, one in figures.items() if key != "cores"}), flush=True)

    def _check(self, found: Sequence[Sequence[Sample]]) -> None:
        """Raise Sg4vError if a request failed, or if two servers were not asked the same."""
        for one in (one for samples in found for one in samples if one.error):
            raise Sg4vError(f"a request failed, so nothing is compared: {one.error}")
        for pair in zip(*found, strict=True):
            counts = {(one.prompt_tokens, one.completion_tokens) for one in pair}
            if len(counts) > 1:
                raise Sg4vError(
                    f"the servers counted {sorted(counts)} tokens of prompt and answer for one "
                    "request; they do not do the same work, so their times cannot be compared"
                )


def _cores(side: Side, before: dict[int, tuple[str, float]], seconds: float) -> dict[str, float]:
    """Return how many cores each process of a server kept busy."""
    used: dict[str, float] = {}
    for pid, (name, now_s) in side.cpu_s().items():
        used[name] = used.get(name, 0.0) + (now_s - before.get(pid, ("", 0.0))[1]) / seconds
    return {name: round(cores, 3) for name, cores in sorted(used.items()) if cores >= 0.005}
