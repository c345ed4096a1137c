# SPDX-License-Identifier: Apache-2.0
"""The driver's eye on a running plan: progress bar, status.json, money and deadline.

A thread reads the tally, shows and writes what it says, and decides whether the plan goes on.
The plan asks it at every step of its own loop (`Watch.verdict`): there it can be stopped.
"""

import dataclasses
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Never

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from sg4v_ray.batch.pace import Pace, dollars, expected_dollars
from sg4v_ray.batch.tally import Progress, Tally
from sg4v_ray.core import observe
from sg4v_ray.core.errors import LeaseLost, MoneySpent, Sg4vError
from sg4v_ray.core.lease import Lease
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage
from sg4v_ray.core.where import Where, seconds_of

_log = logging.getLogger(__name__)

STATUS = "status.json"
_CURVES = "curves"
_TERMINAL_S, _FILE_S = 0.5, 15.0
_STATUS_S = 5.0
_NAMED_REASONS = 3
_RATE_S = 120.0
"""Rates and the ETA are of so many seconds: a pool that grew is not slow because it was."""
_MEASURED_ROWS_PER_ACTOR = 64
"""Rows of one actor after which its speed is known well enough to size the pool by it."""


class Resize(Exception):
    """The plan is to be built again with another number of actors."""

    def __init__(self, actors: int) -> None:
        super().__init__(f"{actors} actors")
        self.actors = actors


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What `status.json` beside an artifact says."""

    state: str
    """`in batches` (a teacher's), `running`, `stopped` (resumable) or `finished`."""
    updated: str
    done: int
    """Rows made; a kill loses those of blocks that were not written yet."""
    total: int
    rejected: dict[str, int]
    """By reason, of this run."""
    rows_per_s: float
    """Of the last two minutes."""
    tokens_per_s: float | None
    """None while a teacher's batches are waited for: they tell requests alone."""
    eta_s: float | None
    actors: int
    ready_actors: int
    queue: int
    engine_busy_rate: float
    usd_so_far: float | None
    """Of all runs at this artifact; None where nothing has a price."""
    usd_expected: float | None
    """Of all runs, when this one is done."""


class Watch:
    """What a job knows of itself while it runs. `verdict` is for the plan's thread."""

    def __init__(
        self,
        tally: "ray.actor.ActorHandle[Tally]",
        home: Storage,
        *,
        name: str,
        done: int,
        total: int,
        where: Where,
        lease: Lease,
        budget: RejectBudget | None = None,
        paid_usd: Callable[[], float] | None = None,
    ) -> None:
        self.tally = tally
        self._paid_usd = paid_usd
        self._lease, self._budget = lease, budget
        self._spent_before = _spent_by_earlier_runs(home)
        self._home, self._where = home, where
        self._done, self._total = done, total
        self._started_s = time.monotonic()
        self._recent = deque([(self._started_s, 0, 0)])
        """When how many rows and tokens were done."""
        self._sized = where.finish_by is None
        self._verdicts: deque[Resize | Sg4vError] = deque(maxlen=1)
        self._written_s = self._drawn_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self._curve: list[dict[str, float]] = []
        self._dollars = Gauge(
            observe.DOLLARS.name, observe.DOLLARS.description, observe.DOLLARS.labels
        )
        self._labels = {"artifact": name}
        self._bar: tqdm[Never] = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit="row",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not where.progress,
        )

    def verdict(self) -> Resize | Sg4vError | None:
        """Return what ends the plan now: Resize, LeaseLost, MoneySpent, TooManyRejects."""
        if self._verdicts:
            return self._verdicts.popleft()
        if not self._thread.is_alive():
            return Sg4vError(
                "the watch over this job ended, its traceback is above; nothing is lost, run again"
            )
        return None

    def start(self) -> None:
        """Begin to look every few seconds."""
        self._thread.start()

    def _look_on(self) -> None:
        pause_s = _TERMINAL_S if sys.stderr.isatty() else _STATUS_S
        while not self._stop.wait(pause_s):
            try:
                self.look()
            except STORAGE_ERRORS as error:
                # Nobody reads an old status for truth, and the commit checks the lease again.
                _log.warning("no new %s in %s: %s", STATUS, self._home.root, error)

    def look(self, *, state: str = "running") -> None:
        """Read the tally once; draw, write and decide."""
        progress: Progress = ray.get(self.tally.read.remote())
        now = time.monotonic()
        self._note(progress, now)
        if state != "running" or sys.stderr.isatty() or now - self._drawn_s >= _FILE_S:
            self._drawn_s = now
            self._draw(progress)
        if state != "running" or now - self._written_s >= _STATUS_S:
            self._written_s = now
            self._write(progress, state, now)
        if state == "running":
            try:
                self._lease.check()
            except LeaseLost as error:  # for the plan's thread
                self._verdicts.append(error)
                return
            self._decide(progress, now)

    def close(self, *, state: str) -> None:
        """Look a last time, end the bar and keep the curve of this run for the report."""
        self._stop.set()
        self._thread.join()
        self.look(state=state)
        self._bar.close()
        name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        self._home.put(f"{_CURVES}/{name}.json", json.dumps(self._curve).encode())

    def _left(self, progress: Progress) -> int:
        return max(0, self._total - self._done - progress.rows)

    def _draw(self, progress: Progress) -> None:
        seconds = self._bar.format_dict["elapsed"]
        rate = progress.tokens / seconds if seconds else 0.0
        text = f"{rate:.0f} tokens/s, {progress.rejects.total()} rejected"
        if progress.rejects:
            common = progress.rejects.most_common(_NAMED_REASONS)
            text += f" ({', '.join(f'{count} {reason}' for reason, count in common)})"
        so_far, expected = self._usd(progress)
        if so_far:
            text += f", ${so_far:.2f} of about ${expected or so_far:.2f}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.n = min(self._total, self._done + progress.rows)
        self._bar.refresh()

    def _note(self, progress: Progress, now: float) -> None:
        """Keep the counts of the last minutes, from just before the first row on."""
        if not progress.rows:
            self._recent.clear()
        self._recent.append((now, progress.rows, progress.tokens))
        while len(self._recent) > 2 and self._recent[1][0] < now - _RATE_S:
            self._recent.popleft()

    def status(self, progress: Progress, state: str, now: float) -> Status:
        """Return what is known now."""
        since, rows, tokens = self._recent[0]
        seconds = now - since
        rate = (progress.rows - rows) / seconds if seconds > 0 else 0.0
        left = self._left(progress)
        usd_so_far, usd_expected = self._usd(progress)
        return Status(
            state=state,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
            done=self._total - left,
            total=self._total,
            rejected=dict(sorted(progress.rejects.items())),
            rows_per_s=round(rate, 2),
            tokens_per_s=round((progress.tokens - tokens) / seconds, 1) if seconds > 0 else 0.0,
            eta_s=round(left / rate, 1) if rate else None,
            actors=progress.actors,
            ready_actors=progress.ready_actors,
            queue=progress.queue,
            engine_busy_rate=round(progress.busy_rate, 3),
            usd_so_far=usd_so_far,
            usd_expected=usd_expected,
        )

    def _write(self, progress: Progress, state: str, now: float) -> None:
        status = self.status(progress, state, now)
        self._home.put(STATUS, (json.dumps(dataclasses.asdict(status), indent=1) + "\n").encode())
        seconds = round(now - self._started_s, 1)
        self._curve.append(
            {
                "seconds": seconds,
                "rows": progress.rows,
                "last_row_s": round(max(0.0, progress.last_s - self._started_s), 3),
                "tokens": progress.tokens,
                "actors": progress.ready_actors,
            }
        )
        if status.usd_so_far is not None:
            self._dollars.set(status.usd_so_far, self._labels)

    def _usd(self, progress: Progress) -> tuple[float | None, float | None]:
        """Return the dollars so far, and those expected when all is done; of all runs."""
        left = self._left(progress)
        if self._paid_usd is not None:
            paid, done = self._paid_usd(), self._total - left
            return round(paid, 4), round(paid * self._total / done, 4) if done else None
        run_usd = self._run_usd(progress)
        priced = self._where.gpu_hour_usd is not None
        so_far = round(self._spent_before + run_usd, 4) or (0.0 if priced else None)
        all_of_run = expected_dollars(run_usd, progress.rows, left)
        more = round(self._spent_before + all_of_run, 4) if priced and all_of_run else None
        return so_far, more

    def _run_usd(self, progress: Progress) -> float:
        gpu_s = progress.held_s * self._where.engine_gpus
        return dollars(gpu_s, self._where.gpu_hour_usd or 0.0)

    def _decide(self, progress: Progress, now: float) -> None:
        if self._budget is not None:
            passed = self._budget.foresee(
                rejected=progress.rejects,
                done=progress.rows,
                left=self._left(progress),
                total=self._total,
            )
            if passed is not None:
                self._verdicts.append(passed)
                return
        limit = self._where.max_usd
        if limit is not None:
            spent = self._spent_before + self._run_usd(progress)
            # What the actors cost until we look again is spent before we can stop them.
            next_look = dollars(progress.actors * self._where.engine_gpus * 4 * _STATUS_S, 1.0)
            ahead = next_look * (self._where.gpu_hour_usd or 0.0)
            if spent + ahead >= limit:
                spent_all = MoneySpent(
                    f"stopped at ${spent:.2f} of max_usd ${limit:g}, earlier runs included, with "
                    f"{self._left(progress)} of {self._total} rows left. Finished blocks are kept: "
                    "run again with more (--where.max-usd) to go on"
                )
                self._verdicts.append(spent_all)
                return
        if not self._sized:
            self._size(progress, now)

    def _size(self, progress: Progress, now: float) -> None:
        """Once the speed is known, ask for the actors that make the deadline."""
        if progress.rows < _MEASURED_ROWS_PER_ACTOR * max(1, progress.ready_actors):
            return
        self._sized = True
        pace = Pace(progress.rows, progress.actor_s)
        left_s = seconds_of(self._where.finish_by or "") - (now - self._started_s)
        needed = pace.actors_for(self._left(progress), left_s)
        if needed is None or needed > self._where.max_actors:
            takes_s = pace.seconds_for(self._left(progress), self._where.max_actors) or 0.0
            _log.warning(
                "finish_by %s cannot be made: it needs %s actors, max_actors is %d; with those it "
                "takes %.1f h more. Raise --where.max-actors",
                self._where.finish_by,
                needed or "more than any number of",
                self._where.max_actors,
                takes_s / 3600,
            )
            needed = self._where.max_actors
        needed = max(needed, self._where.min_actors)
        _log.info("%.2f rows/s an actor: %d actors from here on", pace.rows_per_actor_s, needed)
        if needed != self._where.min_actors:
            self._verdicts.append(Resize(needed))


def curves(home: Storage) -> list[list[dict[str, Any]]]:
    """Return rows, tokens and ready actors by second of each run at an artifact, oldest first.

    `last_row_s` is when the last of the rows was finished, on the clock of `seconds`.
    """
    return [json.loads(home.get(path)) for path in home.list(_CURVES)]


def _spent_by_earlier_runs(home: Storage) -> float:
    if not home.exists(STATUS):
        return 0.0
    return float(json.loads(home.get(STATUS)).get("usd_so_far") or 0.0)


@contextmanager
def watching(
    home: Storage,
    done: int,
    total: int,
    where: Where,
    lease: Lease,
    budget: RejectBudget | None = None,
    paid_usd: Callable[[], float] | None = None,
) -> Iterator[Watch]:
    """Start a tally and watch it while the block runs.

    Args:
        done: rows that an earlier run committed.
        total: rows of the index.
        paid_usd: what all runs have paid others; None where nobody is.
    """
    name = "/".join(home.root.rsplit("/", 2)[-2:])
    # On the driver's node: no other node takes it down with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tally = ray.remote(num_cpus=0, scheduling_strategy=here)(Tally).remote(name)
    watch = Watch(
        tally,
        home,
        name=name,
        done=done,
        total=total,
        where=where,
        lease=lease,
        budget=budget,
        paid_usd=paid_usd,
    )
    watch.start()
    state = "stopped"
    try:
        yield watch
        state = "finished"
    finally:
        watch.close(state=state)
        ray.kill(tally)
