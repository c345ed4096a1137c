# SPDX-License-Identifier: Apache-2.0
"""Progress that people see: one count of finished rows for the whole job, drawn by the driver."""

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Never

import ray
from ray.util.metrics import Counter as MetricCounter
from tqdm import tqdm

from sg4v_ray.core import observe
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Progress:
    """What was finished since this run started. Rows of a retried block count again."""

    rows: int = 0
    tokens: int = 0
    rejects: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one run was, from the first actor ready to the last row; None if it had no rows.

    Measured between the first and the last row an engine would look faster than it is: its
    first rows all finish late and together.
    """

    rows_in_last_run: int = 0
    rows_per_s: float | None = None


class Tally:
    """Ray actor that adds up what the work actors report, and exports it to Prometheus."""

    def __init__(self, artifact: str) -> None:
        self._progress = Progress()
        self._ready_s: float | None = None
        self._last_s = 0.0
        self._labels = {"artifact": artifact}
        self._rows, self._tokens, self._rejected = (
            MetricCounter(one.name, one.description, one.labels)
            for one in (observe.ROWS, observe.TOKENS, observe.ROWS_REJECTED)
        )

    def ready(self) -> None:
        """Note that a work actor can take its first row."""
        self._ready_s = self._ready_s or time.monotonic()

    def add(self, rows: int, tokens: int, rejects: list[str]) -> None:
        """Count the rows, generated tokens and reject reasons of one batch."""
        self._last_s = time.monotonic()
        self._progress.rows += rows
        self._progress.tokens += tokens
        self._progress.rejects.update(rejects)
        self._rows.inc(rows, self._labels)
        if tokens:
            self._tokens.inc(tokens, self._labels)
        for reason in rejects:
            self._rejected.inc(1, {**self._labels, "reason": reason})

    def read(self) -> Progress:
        """Return the counts so far."""
        return self._progress

    def speed(self) -> Speed:
        """Return how fast the rows so far were made."""
        rows = self._progress.rows
        if self._ready_s is None or not rows:
            return Speed()
        return Speed(rows, round(rows / max(1e-3, self._last_s - self._ready_s), 2))


@contextmanager
def show_progress(
    home: Storage, done: int, total: int, where: Where
) -> Iterator["ray.actor.ActorHandle[Tally]"]:
    """Start a tally and draw a progress bar with rate, ETA and rejects while the block runs.

    Args:
        done: rows that an earlier run committed.
        total: rows of the index.
    """
    name = "/".join(home.root.rsplit("/", 2)[-2:])
    tally = ray.remote(num_cpus=0)(Tally).remote(name)
    bar = tqdm(
        total=total,
        initial=done,
        desc=name,
        unit="row",
        file=sys.stderr,
        dynamic_ncols=True,
        disable=not where.progress,
    )
    stop = threading.Event()

    pause_s = 0.5 if sys.stderr.isatty() else 15.0  # a log file gets a line now and then

    def draw() -> None:
        while not stop.wait(pause_s):
            _draw(bar, ray.get(tally.read.remote()), done, total)

    thread = threading.Thread(target=draw, name="progress", daemon=True)
    thread.start()
    try:
        yield tally
    finally:
        stop.set()
        thread.join()
        _draw(bar, ray.get(tally.read.remote()), done, total)
        bar.close()
        ray.kill(tally)


def _draw(bar: "tqdm[Never]", progress: Progress, done: int, total: int) -> None:
    seconds = bar.format_dict["elapsed"]
    rate = progress.tokens / seconds if seconds else 0.0
    bar.set_postfix_str(f"{rate:.0f} tokens/s, {progress.rejects.total()} rejected", refresh=False)
    bar.n = min(total, done + progress.rows)
    bar.refresh()
