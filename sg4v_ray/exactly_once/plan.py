# SPDX-License-Identifier: Apache-2.0
"""The plan that sends every part of an index once through a pool of work actors.

    unfinished parts -> actor pool (each actor runs decode tasks and commits its parts) -> figures

A resume lists the attempt's folder once and leaves out the parts that have an object. At the end
the footers of all objects are checked against the index; damaged, foreign and missing parts are
made again by the same run.
"""

import gc
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from sg4v_ray.core.artifact import software_versions
from sg4v_ray.core.errors import ArtifactCorrupt, Sg4vError
from sg4v_ray.core.lease import Lease
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.row_files import RowIndex
from sg4v_ray.core.rows import ROWS
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.capacity import (
    check_cluster_capacity,
    decode_tasks_per_actor,
    initial_pool_size,
    max_pool_size,
    parts_at_once,
    rows_per_decode_task,
)
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.exactly_once.monitor import JobMonitor, Resize, monitored
from sg4v_ray.exactly_once.part_actor import PartActor, PartJob, Prepare
from sg4v_ray.exactly_once.parts import (
    CheckedParts,
    Part,
    check_parts,
    part_name,
    part_size,
    revisions_listed,
    split_into_parts,
)
from sg4v_ray.exactly_once.progress import Speed
from sg4v_ray.exactly_once.upgrade import adopt_rows_of_0_1

_log = logging.getLogger(__name__)

_PLAN: Final = "plan.json"
_MAX_ROUNDS: Final = 5
"""The first round makes all parts, later ones those that the check at its end found damaged or
missing. A store that loses objects faster than they are made ends the job."""
_REPORTED: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorStep:
    """The expensive step: an actor class that turns each prepared row into one row."""

    actor: type[PartActor]
    kwargs: dict[str, Any]
    """Constructor arguments beside those of `PartActor`."""
    prepare: Prepare
    """Decode step before it, in CPU tasks."""
    record: type
    """Record class of the rows that come out."""
    capacity: int
    """Rows that one actor processes at once. At most twice as many are decoded or in process."""
    paid_usd: Callable[[], float] | None = None
    """Returns the amount that all runs of this job have paid to a provider; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One pass over an index, inside an artifact."""

    artifact_dir: Storage
    number: int
    """1 is the first attempt; others retry rejects."""
    index: RowIndex
    identity: str
    """Fingerprint of the artifact and of this attempt's limits."""

    @property
    def out(self) -> Storage:
        """The folder of the parts."""
        return self.artifact_dir.sub(attempt_folder(self.number))


def attempt_folder(attempt: int) -> str:
    """Return the folder of an artifact that holds the rows of an attempt."""
    return f"{ROWS}/attempt-{attempt:04d}"


def run(
    attempt: Attempt,
    *,
    step: ActorStep,
    batching: Batching,
    where: Where,
    lease: Lease,
    budget: RejectBudget | None = None,
) -> tuple[CheckedParts, Speed]:
    """Make every part of an attempt that has no valid object.

    Args:
        budget: ends the run early, see `RejectBudget.foresee`; None never does.

    Returns:
        The valid object of each part, and the throughput of the first round of this run.

    Raises:
        ArtifactCorrupt: parts stay damaged after several rounds.
        ConfigError: the cluster is too small for one engine and one decode task.
        LeaseLost: another driver took over.
        MoneySpent: the cost reaches `max_usd`; committed parts are kept.
        TooManyRejects: the budget will be exceeded; committed parts are kept.
        Sg4vError: any error that a work actor raised on purpose.
    """
    out, index = attempt.out, attempt.index
    parts = split_into_parts(index, _pinned_part_size(out, index, batching))
    names = list(out.list())
    if attempt.number == 1 and adopt_rows_of_0_1(
        attempt.artifact_dir,
        out,
        names,
        index,
        parts,
        record=step.record,
        identity=attempt.identity,
    ):
        names = list(out.list())
    listed = revisions_listed(names)
    todo = [(part, part_name(part.number)) for part in parts if part.number not in listed]
    speed = Speed()
    for number in range(_MAX_ROUNDS):
        if todo:
            made = _make(attempt, todo, parts, step, batching, where, lease, budget)
            if number == 0:  # the speed of a few parts that are made again is not that of the run
                speed = made
        checked = check_parts(out, index, parts, identity=attempt.identity)
        if not checked.missing:
            return checked, speed
        todo = _next_names(out, checked)
    raise ArtifactCorrupt(
        f"{out.root}: {len(checked.missing)} parts are missing or damaged after {_MAX_ROUNDS} "
        "rounds" + "".join(f"; {one.path}: {one.reason}" for one in checked.problems[:_REPORTED])
        + ". No manifest was written. Check the storage for processes that delete or overwrite "
        "objects, then run again: valid parts are kept"
    )  # fmt: skip


def _pinned_part_size(out: Storage, index: RowIndex, batching: Batching) -> int:
    """Return the part size of this attempt's first run, and report changed software."""
    plan = {
        "rows_per_part": part_size(index, batching.rows_per_part),
        "index_sha256": index.sha256,
        "software": software_versions(),
    }
    if out.create(_PLAN, (json.dumps(plan, indent=1) + "\n").encode()):
        return int(plan["rows_per_part"])  # type: ignore[call-overload]
    pinned = json.loads(out.get(_PLAN))
    changed = [
        f"{name} {pinned['software'].get(name, 'none')} -> {version}"
        for name, version in software_versions().items()
        if pinned["software"].get(name) != version
    ]
    if changed:
        _log.warning(
            "%s was started with other software (%s); each part records its versions",
            out.root, ", ".join(changed),
        )  # fmt: skip
    return int(pinned["rows_per_part"])


def _next_names(out: Storage, checked: CheckedParts) -> list[tuple[Part, str]]:
    """Return the next object name of each missing part, and report damaged objects."""
    for one in checked.problems[:_REPORTED]:
        _log.warning("%s: %s; the part is made again", out.uri(one.path), one.reason)
    if (more := len(checked.problems) - _REPORTED) > 0:
        _log.warning("%s: %d more parts are made again", out.root, more)
    listed = revisions_listed(out.list())
    return [
        (part, part_name(part.number, max(listed.get(part.number, [-1])) + 1))
        for part in checked.missing
    ]


def _make(
    attempt: Attempt,
    todo: list[tuple[Part, str]],
    parts: list[Part],
    step: ActorStep,
    batching: Batching,
    where: Where,
    lease: Lease,
    budget: RejectBudget | None,
) -> Speed:
    """Run the plan over some parts; when the monitor asks for another pool size, build it again."""
    check_cluster_capacity(where)
    total, left = sum(one.rows for one in parts), sum(one.rows for one, _ in todo)
    waiting = {part.number: (part, name) for part, name in todo}
    dir_ = attempt.artifact_dir
    with (
        plain_data(),
        monitored(dir_, total - left, total, where, lease, budget, step.paid_usd) as monitor,
        _stopped_by(monitor),
    ):
        if where.finish_by is not None:
            # While the throughput is measured, more actors than needed would be started.
            where = replace(where, max_actors=where.min_actors)
        initial_actors = where.min_actors
        while waiting:
            try:
                for number, rows, rejects in _execute(
                    attempt, list(waiting.values()), step, batching, where, monitor, initial_actors
                ):
                    if waiting.pop(number, None) is not None:
                        monitor.add_part(rows, rejects)
                break
            except _PlanEnded as ended:
                if not isinstance(ended.reason, Resize):
                    raise ended.reason from None
                ray.get(monitor.progress.drop_pool.remote())
                where = replace(where, max_actors=ended.reason.actors)
                initial_actors = initial_pool_size(where)
            except Sg4vError as error:
                # Ray's error also has the type of its cause, with a page of traceback as text.
                raise getattr(error, "cause", error) from None
            # The ended plan's objects form reference cycles that keep its actors alive.
            gc.collect()
        speed: Speed = ray.get(monitor.progress.speed.remote())
        return speed


class _PlanEnded(ExecutionTimeoutError):
    """The monitor ended the plan. Ray logs other errors as its own bugs, with a traceback; a log
    handler that keeps it keeps the ended plan's actors and their CPUs."""

    def __init__(self, reason: Resize | Sg4vError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _StopCheck(ExecutionCallback):
    """Lets the monitor end the plan. Ray creates this object and pickles its class, so the monitor
    is a class attribute."""

    monitor: ClassVar[JobMonitor | None] = None

    def on_execution_step(self, executor: object) -> None:
        """Raise the monitor's decision."""
        if _StopCheck.monitor is not None and (reason := _StopCheck.monitor.stop_reason()):
            raise _PlanEnded(reason)


@contextmanager
def _stopped_by(monitor: JobMonitor) -> Iterator[None]:
    context = DataContext.get_current()
    before = list(context.custom_execution_callback_classes)
    _StopCheck.monitor = monitor
    context.custom_execution_callback_classes = [*before, _StopCheck]
    try:
        yield
    finally:
        _StopCheck.monitor = None
        context.custom_execution_callback_classes = before


def _execute(
    attempt: Attempt,
    todo: list[tuple[Part, str]],
    step: ActorStep,
    batching: Batching,
    where: Where,
    monitor: JobMonitor,
    initial_actors: int,
) -> Iterator[tuple[int, int, dict[str, int]]]:
    """Yield number, rows and rejects by reason of each part as soon as it is committed."""
    rows_in_flight = 2 * step.capacity
    rows_per_task = rows_per_decode_task(step.capacity, batching.rows_per_task)
    rows_per_part = max(part.rows for part, _ in todo)
    job = PartJob(
        index=attempt.index,
        index_sha256=attempt.index.sha256,
        out=attempt.out,
        identity=attempt.identity,
        prepare=step.prepare,
        record=step.record,
        decode_cpus=where.decode_cpus,
        rows_per_task=rows_per_task,
        decode_tasks=decode_tasks_per_actor(where, rows_in_flight, rows_per_task),
    )
    shared = {**step.kwargs, "job": job, "rows_in_flight": rows_in_flight}
    # Not from_arrow: that runs one task for each table.
    rows = ray.data.from_blocks([_part_block(part, name) for part, name in todo])
    rows = rows.map_batches(
        step.actor,
        fn_constructor_kwargs={**shared, "progress": monitor.progress},
        batch_size=1,  # a part; Ray Data refuses None for actors with GPUs
        batch_format="pyarrow",
        num_cpus=where.engine_cpus,
        num_gpus=where.engine_gpus,
        compute=ActorPoolStrategy(
            min_size=where.min_actors,
            max_size=max_pool_size(where),
            initial_size=initial_actors,
            max_concurrent_calls_per_actor=parts_at_once(rows_in_flight, rows_per_part),
        ),
    )
    for figures in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in figures.to_pylist():
            yield row["part"], row["rows"], json.loads(row["rejects"])


def _part_block(part: Part, name: str) -> pa.Table:
    return pa.table(
        {
            "number": [part.number],
            "file": [part.file],
            "first": [part.first],
            "rows": [part.rows],
            "name": [name],
        }
    )


@contextmanager
def plain_data() -> Iterator[None]:
    """Change Ray Data's settings for datasets made inside.

    No progress bars of its own, errors with their types, and no poll of the memory of each actor:
    once a second it walks all mappings of the process, which an engine has many of.
    """
    with _context_fields(
        enable_progress_bars=False,
        raise_original_map_exception=True,
        memory_usage_poll_interval_s=None,
    ):
        yield


@contextmanager
def _context_fields(**wanted: Any) -> Iterator[None]:
    """Set fields of Ray Data's context, and restore them."""
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
