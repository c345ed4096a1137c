# SPDX-License-Identifier: Apache-2.0
"""What the work actors of one job report, added up in one place outside of them."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import ray
from ray.util.metrics import Counter as MetricCounter
from ray.util.metrics import Gauge

from sg4v_ray.batch.strikes import Strikes
from sg4v_ray.core import observe
from sg4v_ray.inference.engine import EngineStats

_BEAT_S, _SAMPLES = 2.0, 8
ALIVE_S = 10.0
"""An actor that was silent for so long is counted as gone."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What one actor says of itself every few seconds."""

    running: int
    """Requests in its decoding batch."""
    waiting: int
    """Requests that wait inside the engine."""
    busy_rate: float
    """Share of the time since the last beat in which something ran, 0 to 1."""


@dataclass(slots=True)
class Progress:
    """What was finished since this run started. Rows of a retried block count again."""

    rows: int = 0
    last_s: float = 0.0
    """When the last of them was finished, by the monotonic clock of the driver's machine."""
    tokens: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    actors: int = 0
    """Actors that were heard of lately, loading ones included."""
    ready_actors: int = 0
    """Those of them that can take rows."""
    held_s: float = 0.0
    """Seconds for which actors held their resources, summed over the actors. What is paid for."""
    actor_s: float = 0.0
    """Seconds of actors that could take rows, summed over the actors."""
    queue: int = 0
    """Requests that wait inside the engines."""
    busy_rate: float = 0.0
    """Mean over the ready actors."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one run was, from the first actor ready to the last row; None if it had no rows.

    Measured between the first and the last row an engine would look faster than it is: its
    first rows all finish late and together.
    """

    rows_in_last_run: int = 0
    rows_per_s: float | None = None


@dataclass(slots=True)
class _Actor:
    began_s: float
    heard_s: float
    ready_s: float | None = None
    earlier_s: float = 0.0
    """Seconds for which it could take rows before it died and was started again."""
    beat: Beat = Beat(0, 0, 0.0)

    @property
    def useful_s(self) -> float:
        """Seconds for which it could take rows."""
        return self.earlier_s + (0.0 if self.ready_s is None else self.heard_s - self.ready_s)


async def keep_beating(
    tally: "ray.actor.ActorHandle[Tally]", engine: str, stats: Callable[[], EngineStats | None]
) -> None:
    """Tell the tally every few seconds that an actor lives; `stats` is None while it loads."""
    while True:
        busy = 0
        for _ in range(_SAMPLES):
            await asyncio.sleep(_BEAT_S / _SAMPLES)
            now = stats()
            busy += now is not None and now.running > 0
        beat = None if now is None else Beat(now.running, now.waiting, busy / _SAMPLES)
        tally.beat.remote(engine, beat)


class Tally:
    """Ray actor that adds up what the work actors report, and exports it to Prometheus."""

    def __init__(self, artifact: str) -> None:
        self._progress, self._strikes = Progress(), Strikes()
        self._actors: dict[str, _Actor] = {}
        self._earlier = Progress()
        """Seconds of actors of pools that are gone."""
        self._ready_s: float | None = None
        self._labels = {"artifact": artifact}
        self._rows, self._tokens, self._rejected, self._engine_s = (
            MetricCounter(one.name, one.description, one.labels)
            for one in (observe.ROWS, observe.TOKENS, observe.ROWS_REJECTED, observe.ENGINE_S)
        )
        self._queue, self._busy, self._alive = (
            Gauge(one.name, one.description, one.labels)
            for one in (observe.QUEUE, observe.BUSY, observe.ACTORS)
        )

    def beat(self, engine: str, beat: Beat | None) -> None:
        """Note that an actor lives; `beat` is None while it loads."""
        now = time.monotonic()
        actor = self._actors.setdefault(engine, _Actor(now, now))
        actor.heard_s = now
        if beat is not None:
            actor.beat = beat

    def ready(self, engine: str) -> None:
        """Note that a work actor can take its first row."""
        now = time.monotonic()
        self._ready_s = self._ready_s or now
        self._actors.setdefault(engine, _Actor(now, now)).ready_s = now

    def finish(
        self,
        engine: str,
        ids: list[str],
        *,
        rows: int,
        tokens: int,
        rejects: list[str],
        engine_s: float,
    ) -> None:
        """Count the rows, generated tokens, reject reasons and engine seconds of one batch.

        Args:
            engine: who made it.
            ids: the rows that were in the engine and came out alive; see `Strikes.leave`.
        """
        self._strikes.leave(engine, ids)
        self._progress.last_s = time.monotonic()
        self._progress.rows += rows
        self._progress.tokens += tokens
        self._progress.rejects.update(rejects)
        self._rows.inc(rows, self._labels)
        if tokens:
            self._tokens.inc(tokens, self._labels)
        if engine_s:
            self._engine_s.inc(engine_s, self._labels)
        for reason in rejects:
            self._rejected.inc(1, {**self._labels, "reason": reason})

    def enter(self, engine: str, ids: list[str]) -> dict[str, int]:
        """Note rows that go into an engine; see `Strikes.enter`."""
        return self._strikes.enter(engine, ids)

    def enter_alone(self, engine: str, key: str) -> None:
        """Note a row that goes into an engine alone; see `Strikes.enter_alone`."""
        self._strikes.enter_alone(engine, key)

    def leave(self, engine: str, ids: list[str]) -> None:
        """Note rows that came out of an engine; see `Strikes.leave`."""
        self._strikes.leave(engine, ids)

    def starts(self, engine: str) -> None:
        """Note that an actor starts. What an earlier life of it had inside gets a strike."""
        self._strikes.died(engine)
        now = time.monotonic()
        # Paid for from here on, while the weights are still being fetched.
        actor = self._actors.setdefault(engine, _Actor(now, now))
        if actor.ready_s is not None:
            actor.earlier_s += actor.heard_s - actor.ready_s
            actor.ready_s = None

    def drop_pool(self) -> None:
        """Note that all actors so far are gone, because the plan is built again."""
        self._earlier = self.read()
        self._actors.clear()

    def read(self) -> Progress:
        """Return the counts so far."""
        now = time.monotonic()
        alive = [one for one in self._actors.values() if now - one.heard_s < ALIVE_S]
        ready = [one for one in alive if one.ready_s is not None]
        busy = sum(one.beat.busy_rate for one in ready) / len(ready) if ready else 0.0
        queue = sum(one.beat.waiting for one in ready)
        self._queue.set(queue, self._labels)
        self._busy.set(busy, self._labels)
        self._alive.set(len(alive), self._labels)
        return replace(
            self._progress,
            actors=len(alive),
            ready_actors=len(ready),
            held_s=self._earlier.held_s
            + sum(one.heard_s - one.began_s for one in self._actors.values()),
            actor_s=self._earlier.actor_s + sum(one.useful_s for one in self._actors.values()),
            queue=queue,
            busy_rate=busy,
        )

    def speed(self) -> Speed:
        """Return how fast the rows so far were made."""
        rows = self._progress.rows
        if self._ready_s is None or not rows:
            return Speed()
        return Speed(rows, round(rows / max(1e-3, self._progress.last_s - self._ready_s), 2))
