# SPDX-License-Identifier: Apache-2.0
"""The monitor of a running job: progress bar, status.json, cost, time budget and lease.

A thread polls the progress actor, shows and writes the figures, and decides whether the plan goes
on. The plan reads the decision at every step of Ray Data's scheduling loop (`stop_reason`).
"""

import dataclasses
import json
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Never

import ray
from ray.exceptions import RayError
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from sg4v_ray.core import observe
from sg4v_ray.core.errors import LeaseLost, MoneySpent, Sg4vError, StorageError
from sg4v_ray.core.lease import Lease
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage
from sg4v_ray.core.where import Where, seconds_of
from sg4v_ray.exactly_once.progress import Progress, ProgressActor
from sg4v_ray.exactly_once.throughput import Throughput, dollars, expected_dollars

_log = logging.getLogger(__name__)

STATUS = "status.json"
_CURVES = "curves"
_COMMITTING = "committing"
_TERMINAL_S, _FILE_S = 0.5, 15.0
_STATUS_S = 5.0
_NAMED_REASONS = 3
_RATE_S = 120.0
"""Window of rates and of the ETA: a pool that has grown must not count as slow."""
_MEASURED_ROWS_PER_ACTOR = 64
"""Rows per actor after which its throughput is accurate enough to size the pool."""


class Resize(Exception):
    """The plan must be built again with another number of actors."""

    def __init__(self, actors: int) -> None:
        super().__init__(f"{actors} actors")
        self.actors = actors


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The content of `status.json` in the folder of an artifact."""

    state: str
    """`in batches` (a teacher's), `running`, `committing` (all rows are written, the manifest is
    not), `stopped` (resumable) or `finished`."""
    updated: str
    done: int
    """Finished rows; a kill loses those of parts that are not committed yet."""
    total: int
    rejected: dict[str, int]
    """Rejected rows by reason: of this run, and of all rows once the state is `finished`."""
    rows_per_s: float
    """Mean of the last two minutes."""
    tokens_per_s: float | None
    """None while the job waits for a teacher's batches: these report requests only."""
    eta_s: float | None
    actors: int
    ready_actors: int
    queue: int
    engine_busy_rate: float
    usd_so_far: float | None
    """Cost of all runs at this artifact; None without a price."""
    usd_expected: float | None
    """Expected cost of all runs at the end of this run."""


class JobMonitor:
    """Polls the progress of a job in a thread. `stop_reason` is for the plan's thread."""

    def __init__(
        self,
        progress: "ray.actor.ActorHandle[ProgressActor]",
        artifact_dir: Storage,
        *,
        name: str,
        done: int,
        total: int,
        where: Where,
        lease: Lease,
        budget: RejectBudget | None = None,
        paid_usd: Callable[[], float] | None = None,
    ) -> None:
        self.progress = progress
        self._paid_usd = paid_usd
        self._lease, self._budget = lease, budget
        self._spent_before = _spent_by_earlier_runs(artifact_dir)
        self._artifact_dir, self._where = artifact_dir, where
        self._done, self._total = done, total
        self._started_s = time.monotonic()
        self._recent = deque([(self._started_s, 0, 0)])
        """Time, rows and tokens of the last polls."""
        self._sized = where.finish_by is None
        self._reasons: deque[Resize | Sg4vError] = deque(maxlen=1)
        self._written_s = self._drawn_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll_loop, name="monitor", daemon=True)
        self._is_overtaken = False
        self._curve: list[dict[str, float]] = []
        self._committed: tuple[int, Counter[str]] = (0, Counter())
        """Rows and rejects of the parts of this run, replaced as a whole: two threads use it."""
        self._dollars = Gauge(
            observe.DOLLARS.name, observe.DOLLARS.description, observe.DOLLARS.labels
        )
        self._labels = {"artifact": name}
        self._bar: tqdm[Never] = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit="row",
            # Not tqdm's rate and ETA: these count the time in which the engines start.
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not where.progress,
        )

    def add_part(self, rows: int, rejects: Mapping[str, int]) -> None:
        """Count a committed part for the reject budget.

        Slices are no measure: those of a part that is made again are counted again.
        """
        before, counts = self._committed
        self._committed = (before + rows, counts + Counter(rejects))

    def stop_reason(self) -> Resize | Sg4vError | None:
        """Return the reason to end the plan: Resize, LeaseLost, MoneySpent, TooManyRejects, or
        Sg4vError if this thread has died.
        """
        if self._reasons:
            return self._reasons.popleft()
        if not self._thread.is_alive():
            return Sg4vError(
                "the monitor of this job ended, its traceback is above; committed parts are kept, "
                "run the same command again"
            )
        return None

    def start(self) -> None:
        """Poll every few seconds from now on."""
        self._thread.start()

    def _poll_loop(self) -> None:
        pause_s = _TERMINAL_S if sys.stderr.isatty() else _STATUS_S
        while not self._stop.wait(pause_s):
            try:
                self.poll()
            except STORAGE_ERRORS as error:
                # An old status is harmless, and the commit checks the lease again.
                _log.warning("no new %s in %s: %s", STATUS, self._artifact_dir.root, error)

    def poll(self, *, state: str = "running") -> None:
        """Read the progress once; draw, write and decide."""
        progress: Progress = ray.get(self.progress.read.remote())
        now = time.monotonic()
        self._note(progress, now)
        if state != "running" or sys.stderr.isatty() or now - self._drawn_s >= _FILE_S:
            self._drawn_s = now
            self._draw(progress, now)
        # Before the write: a writer that was suspended and overtaken must not replace the status.
        try:
            self._lease.check()
        except LeaseLost as error:  # raised by the plan's thread
            self._is_overtaken = True
            self._reasons.append(error)
            return
        if state != "running" or now - self._written_s >= _STATUS_S:
            self._written_s = now
            self._write(progress, state, now)
        if state == "running":
            self._decide(progress, now)

    def close(self, *, state: str) -> None:
        """Poll a last time, end the bar and store the curve of this run for the report.

        Nothing is stored once another writer has taken over. A failure here is logged: raised, it
        would replace the error that ended the job.
        """
        self._stop.set()
        self._thread.join()
        try:
            self.poll(state=state)
            if not self._is_overtaken:
                name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
                self._artifact_dir.put(f"{_CURVES}/{name}.json", json.dumps(self._curve).encode())
        except (*STORAGE_ERRORS, RayError) as error:
            _log.warning("the last %s in %s is missing: %s", STATUS, self._artifact_dir.root, error)
        self._bar.close()

    def _left(self, progress: Progress) -> int:
        return max(0, self._total - self._done - progress.rows)

    def _draw(self, progress: Progress, now: float) -> None:
        rows_per_s, tokens_per_s = self._rates(progress, now)
        if not rows_per_s:
            text = f"{progress.ready_actors} of {progress.actors} started actors ready"
        else:
            eta = tqdm.format_interval(self._left(progress) / rows_per_s)
            text = f"ETA {eta}, {rows_per_s:.2f} rows/s, {tokens_per_s:.0f} tokens/s"
        text += f", {progress.rejects.total()} rejected"
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
        """Keep the counts of the rate window, starting just before the first row."""
        if not progress.rows:
            self._recent.clear()
        self._recent.append((now, progress.rows, progress.tokens))
        while len(self._recent) > 2 and self._recent[1][0] < now - _RATE_S:
            self._recent.popleft()

    def _rates(self, progress: Progress, now: float) -> tuple[float, float]:
        """Return rows and tokens per second, means of the last two minutes."""
        since, rows, tokens = self._recent[0]
        seconds = now - since
        if seconds <= 0:
            return 0.0, 0.0
        return (progress.rows - rows) / seconds, (progress.tokens - tokens) / seconds

    def status(self, progress: Progress, state: str, now: float) -> Status:
        """Return the present status."""
        rate, tokens_per_s = self._rates(progress, now)
        left = self._left(progress)
        usd_so_far, usd_expected = self._usd(progress)
        return Status(
            state=state,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
            done=self._total - left,
            total=self._total,
            rejected=dict(sorted(progress.rejects.items())),
            rows_per_s=round(rate, 2),
            tokens_per_s=round(tokens_per_s, 1),
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
        _put_status(self._artifact_dir, dataclasses.asdict(status))
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
        """Return the cost so far and the expected cost at the end, of all runs."""
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
            rows, rejects = self._committed
            passed = self._budget.foresee(
                rejected=rejects,
                done=rows,
                left=self._left(progress),
                total=self._total,
            )
            if passed is not None:
                self._reasons.append(passed)
                return
        limit = self._where.max_usd
        if limit is not None:
            spent = self._spent_before + self._run_usd(progress)
            # The cost of the actors until the next poll is spent before they can be stopped.
            until_poll = dollars(progress.actors * self._where.engine_gpus * 4 * _STATUS_S, 1.0)
            ahead = until_poll * (self._where.gpu_hour_usd or 0.0)
            if spent + ahead >= limit:
                spent_all = MoneySpent(
                    f"stopped at ${spent:.2f} of max_usd ${limit:g}, earlier runs included, with "
                    f"{self._left(progress)} of {self._total} rows left. Committed parts are kept: "
                    "raise --where.max-usd and run again to continue"
                )
                self._reasons.append(spent_all)
                return
        if not self._sized:
            self._size(progress, now)

    def _size(self, progress: Progress, now: float) -> None:
        """Size the pool for the time budget once the throughput is measured."""
        if progress.rows < _MEASURED_ROWS_PER_ACTOR * max(1, progress.ready_actors):
            return
        self._sized = True
        measured = Throughput(progress.rows, progress.actor_s)
        left_s = seconds_of(self._where.finish_by or "") - (now - self._started_s)
        needed = measured.actors_for(self._left(progress), left_s)
        if needed is None or needed > self._where.max_actors:
            takes_s = measured.seconds_for(self._left(progress), self._where.max_actors) or 0.0
            _log.warning(
                "finish_by %s cannot be met: it needs %s actors, max_actors is %d; with these it "
                "takes %.1f h more. Raise --where.max-actors",
                self._where.finish_by,
                needed or "more than any number of",
                self._where.max_actors,
                takes_s / 3600,
            )
            needed = self._where.max_actors
        needed = max(needed, self._where.min_actors)
        _log.info("%.2f rows/s per actor: %d actors from now on", measured.rows_per_actor_s, needed)
        if needed != self._where.min_actors:
            self._reasons.append(Resize(needed))


def curves(artifact_dir: Storage) -> list[list[dict[str, Any]]]:
    """Return rows, tokens and ready actors by second of each run at an artifact, oldest first.

    `last_row_s` is the time of the last finished row, on the clock of `seconds`.
    """
    return [json.loads(artifact_dir.get(path)) for path in artifact_dir.list(_CURVES)]


def _spent_by_earlier_runs(artifact_dir: Storage) -> float:
    return float(_last_status(artifact_dir).get("usd_so_far") or 0.0)


def _last_status(artifact_dir: Storage) -> dict[str, Any]:
    """Return the content of `status.json`, which an earlier version may have written.

    Raises:
        StorageError: it is damaged, so the cost of earlier runs is unknown.
    """
    if not artifact_dir.exists(STATUS):
        return {}
    try:
        status = json.loads(artifact_dir.get(STATUS))
    except ValueError:
        status = None
    if not isinstance(status, dict):
        raise StorageError(
            f"{artifact_dir.uri(STATUS)} is damaged, and it holds the cost of earlier runs; delete "
            "it and run again, the cost then counts from 0"
        )
    return status


def put_final_status(artifact_dir: Storage, counts: Mapping[str, int]) -> None:
    """Write the `status.json` of a committed artifact. A failure is logged: the job has succeeded.

    Args:
        counts: of the manifest.
    """
    try:
        _put_status(artifact_dir, _final_status(counts, _last_status(artifact_dir)))
    except (*STORAGE_ERRORS, StorageError) as error:
        _log.warning("%s in %s is out of date: %s", STATUS, artifact_dir.root, error)


def _final_status(counts: Mapping[str, int], before: dict[str, Any]) -> dict[str, Any]:
    status = Status(
        state="finished",
        updated=datetime.now(UTC).isoformat(timespec="seconds"),
        done=counts["rows"],
        total=counts["rows"],
        rejected={
            name.removeprefix("rejected_"): count
            for name, count in counts.items()
            if name.startswith("rejected_") and count
        },
        rows_per_s=before.get("rows_per_s", 0.0),
        tokens_per_s=before.get("tokens_per_s"),
        eta_s=0.0,
        actors=0,
        ready_actors=0,
        queue=0,
        engine_busy_rate=0.0,
        usd_so_far=before.get("usd_so_far"),
        usd_expected=before.get("usd_so_far"),
    )
    return dataclasses.asdict(status)


@contextmanager
def stopped_on_error(artifact_dir: Storage, lease: Lease) -> Iterator[None]:
    """Set the state `committing` to `stopped` if the block ends without a commit."""
    try:
        yield
    except BaseException:
        try:
            lease.check()
            status = _last_status(artifact_dir)
            if status.get("state") == _COMMITTING:
                _put_status(artifact_dir, {**status, "state": "stopped"})
        except LeaseLost:
            _log.debug("%s in %s is another writer's now", STATUS, artifact_dir.root)
        except (*STORAGE_ERRORS, Sg4vError) as error:
            # Not raised: it would replace the error that ended the job.
            _log.warning("%s in %s is out of date: %s", STATUS, artifact_dir.root, error)
        raise


def _put_status(artifact_dir: Storage, status: dict[str, Any]) -> None:
    artifact_dir.put(STATUS, (json.dumps(status, indent=1) + "\n").encode())


@contextmanager
def monitored(
    artifact_dir: Storage,
    done: int,
    total: int,
    where: Where,
    lease: Lease,
    budget: RejectBudget | None = None,
    paid_usd: Callable[[], float] | None = None,
) -> Iterator[JobMonitor]:
    """Start a progress actor and monitor it while the block runs.

    Args:
        done: rows that earlier runs committed.
        total: rows of the index.
        paid_usd: returns the amount that all runs have paid to a provider; None without one.
    """
    name = "/".join(artifact_dir.root.rsplit("/", 2)[-2:])
    # On the driver's node: no other node takes it down with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressActor).remote(name)
    monitor = JobMonitor(
        progress,
        artifact_dir,
        name=name,
        done=done,
        total=total,
        where=where,
        lease=lease,
        budget=budget,
        paid_usd=paid_usd,
    )
    monitor.start()
    state = "stopped"
    try:
        yield monitor
        state = _COMMITTING
    finally:
        monitor.close(state=state)
        ray.kill(progress)
