# SPDX-License-Identifier: Apache-2.0
"""Every row of an index exactly once through an expensive step, whatever dies on the way.

    index (Parquet) -> repartition -> prepare (CPU tasks) -> work (actor pool) -> Parquet

The exactly-once part is Ray Data's own checkpoint: the ids of a block are noted as pending, its
file is written, the note is renamed. On a restart Ray deletes pending blocks, and the read tasks
leave out the noted ids. Ray protects a plan only when it starts with a read and ends
with a file write, and says so in a warning at best; so the plan is built here and nowhere else.
The commit does not trust it either: it counts (`verify`).
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from pyarrow import dataset
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.checkpoint import CheckpointConfig, IdColumnCheckpointManager
from ray.data.exceptions import ExecutionTimeoutError

from sg4v_ray.batch.room import LIGHT_CPUS, actors_at_once, check_cluster
from sg4v_ray.batch.tally import Speed, Tally
from sg4v_ray.batch.watch import Resize, Watch, watching
from sg4v_ray.batch.writers import MARK, mark_writers, wait_for_old_writers
from sg4v_ray.core.errors import ArtifactCorrupt, ConfigError, Sg4vError
from sg4v_ray.core.lease import Lease
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.rows import ROWS, read_columns
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where

_log = logging.getLogger(__name__)

_PENDING = ".pending.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """How rows flow through the plan. Does not change any result, so it is not identity."""

    rows_per_block: int = 512
    """Rows that are committed together: about 30 s of one actor's work. Smaller blocks lose less
    at a kill; larger ones make fewer files."""
    batch_size: int = 16
    """Rows of one call of the work actor."""
    batches_in_flight: int = 8
    """Blocks that one actor works on at once; each keeps at least a batch inside the engine."""

    def __post_init__(self) -> None:
        for name in ("rows_per_block", "batch_size", "batches_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check_fills(self, capacity: int, name: str = "--engine.capacity") -> None:
        """Raise ConfigError if what works on that many rows at once may never have them all.

        Without this a large accelerator would run half empty, without a word.
        """
        rows = self.batch_size * self.batches_in_flight
        if rows < capacity:
            needed = math.ceil(capacity / self.batch_size)
            raise ConfigError(
                f"flow.batch_size {self.batch_size} x flow.batches_in_flight "
                f"{self.batches_in_flight} = {rows} rows, fewer than {name} {capacity}; give "
                f"--flow.batches-in-flight at least {needed}, or a smaller {name}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The expensive step: an async actor class, one row in, one row out."""

    actor: type
    kwargs: dict[str, Any]
    """Constructor arguments; a `tally` handle is added."""
    prepare: Callable[[pa.Table], pa.Table]
    """Cheap step before it, on CPU tasks."""
    record: type
    """The record class of the rows that come out."""
    paid_usd: Callable[[], float] | None = None
    """What all runs of this job have paid others so far; None where nobody is paid."""


def rows_of(attempt: int) -> str:
    """Return the folder of an artifact that holds the rows of an attempt (1 is the first)."""
    return f"{ROWS}/attempt-{attempt:04d}"


def checkpoint_of(attempt: int) -> str:
    """Return the folder of an artifact that holds Ray's notes of an attempt's finished rows."""
    return f"checkpoint-{attempt:04d}"


def run(
    *,
    index: Storage,
    home: Storage,
    attempt: int,
    work: Work,
    flow: Flow,
    where: Where,
    lease: Lease,
    budget: RejectBudget | None = None,
) -> Speed:
    """Send every row of `index` through `work` once.

    Args:
        index: folder of Parquet files with a unique `id` column.
        home: the artifact's folder; rows land in `rows_of(attempt)`, and a killed run resumes
            from what lies there.
        budget: ends the run as soon as it is sure to be passed; None never does.

    Returns:
        How fast this run was. The rows' ids are checked by `verify`.

    Raises:
        ArtifactCorrupt: an id is missing or double in the output.
        ConfigError: the cluster is too small for one engine and the light tasks beside it.
        LeaseLost: another driver took over.
        TooManyRejects: the budget will be passed; finished blocks are kept.
        Sg4vError: whatever a work actor raised on purpose, as itself.
    """
    rows = home.sub(rows_of(attempt))
    checkpoint = home.sub(checkpoint_of(attempt))
    wanted = read_columns(index, ["id"])["id"]
    speed = Speed()
    if _pending(checkpoint) or len(_finished(checkpoint)) < len(wanted):
        check_cluster(where)
        wait_for_old_writers(home)
        finished = _finished(checkpoint)
        with (
            _protected(checkpoint),
            watching(
                home, len(finished), len(wanted), where, lease, budget, work.paid_usd
            ) as watch,
            _asked_at_every_step(watch),
        ):
            _execute_resizing(index, rows, checkpoint, work, flow, where, watch, home)
            speed = ray.get(watch.tally.speed.remote())
    folders = f"{rows.root} and its notes in {checkpoint.root}"
    verify(wanted, read_columns(rows, ["id"])["id"], where=folders)
    return speed


def drop_checkpoint(home: Storage, attempt: int) -> None:
    """Delete Ray's notes of finished rows. Only after the manifest: until then they are needed."""
    home.delete(checkpoint_of(attempt))


def _execute_resizing(
    index: Storage,
    out: Storage,
    checkpoint: Storage,
    work: Work,
    flow: Flow,
    where: Where,
    watch: Watch,
    home: Storage,
) -> None:
    """Execute the plan; when the watch wants another number of actors, stop and build it again."""
    if where.finish_by is not None:
        # While the speed is measured Ray would start actors that the deadline may not need.
        where = replace(where, max_actors=where.min_actors)
    initial_actors = where.min_actors
    while True:
        mark = mark_writers(home)
        try:
            rows = _unfinished_rows(index, checkpoint)
            return _execute(rows, out, work, flow, where, watch.tally, mark, initial_actors)
        except _Ended as ended:
            if not isinstance(ended.verdict, Resize):
                raise ended.verdict from None
            ray.get(watch.tally.drop_pool.remote())
            where = replace(where, max_actors=ended.verdict.actors)
            initial_actors = actors_at_once(where)
        except Sg4vError as error:
            # Ray's error is also of the type that it carries, with a page of traceback as text.
            raise getattr(error, "cause", error) from None
        # Actors live as long as what refers to them: the ended plan's objects, in circles.
        gc.collect()
        wait_for_old_writers(home)


class _Ended(ExecutionTimeoutError):
    """The watch ended the plan. Any other error Ray logs as a bug of its own, with a traceback
    that keeps the actors of the ended plan, and their CPUs, for as long as a handler keeps it."""

    def __init__(self, verdict: Resize | Sg4vError) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


class _Check(ExecutionCallback):
    """Lets the watch end the plan. Ray makes this object itself and pickles its class, so the
    watch is found in the module."""

    watch: ClassVar[Watch | None] = None

    def on_execution_step(self, executor: object) -> None:
        """Raise what the watch has decided."""
        if _Check.watch is not None and (verdict := _Check.watch.verdict()) is not None:
            raise _Ended(verdict)


@contextmanager
def _asked_at_every_step(watch: Watch) -> Iterator[None]:
    context = DataContext.get_current()
    before = list(context.custom_execution_callback_classes)
    _Check.watch = watch
    context.custom_execution_callback_classes = [*before, _Check]
    try:
        yield
    finally:
        _Check.watch = None
        context.custom_execution_callback_classes = before


def _execute(
    rows: "ray.data.Dataset",
    out: Storage,
    work: Work,
    flow: Flow,
    where: Where,
    tally: "ray.actor.ActorHandle[Tally]",
    mark: str,
    initial_actors: int,
) -> None:
    rows = rows.repartition(target_num_rows_per_block=flow.rows_per_block)
    rows = rows.map_batches(
        work.prepare,
        batch_size=flow.batch_size,
        batch_format="pyarrow",
        num_cpus=where.decode_cpus,
        # The default, but said: Ray runs two steps of equal arguments as one, and decoding inside
        # the engine's actor would stop the engine.
        max_calls=0,
    )
    rows = rows.map_batches(
        work.actor,
        fn_constructor_kwargs={**work.kwargs, "tally": tally},
        batch_size=flow.batch_size,
        batch_format="pyarrow",
        num_cpus=where.engine_cpus,
        num_gpus=where.engine_gpus,
        compute=ActorPoolStrategy(
            min_size=where.min_actors,
            max_size=where.max_actors,
            initial_size=initial_actors,
            max_concurrent_calls_per_actor=flow.batches_in_flight,
        ),
    )
    _refuse_unprotected(rows)
    filesystem, path = out.arrow()
    rows.write_parquet(
        path,
        filesystem=filesystem,
        ray_remote_args={"num_cpus": LIGHT_CPUS, "runtime_env": {"env_vars": {MARK: mark}}},
    )


def _unfinished_rows(index: Storage, checkpoint: Storage) -> "ray.data.Dataset":
    """Return the index without the rows that were written whole."""
    filesystem, path = index.arrow()
    rows = ray.data.read_parquet(path, filesystem=filesystem, num_cpus=LIGHT_CPUS)
    if not len(finished := _finished(checkpoint)):
        return rows
    leave_out = partial(_leave_out, finished=ray.put(finished))
    # As many CPUs as the read: Ray then does both in one task.
    return rows.map_batches(leave_out, batch_size=None, batch_format="pyarrow", num_cpus=LIGHT_CPUS)


def _leave_out(table: pa.Table, *, finished: "ray.ObjectRef[pa.Array]") -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["id"], value_set=ray.get(finished))))


class _PendingBlocks(IdColumnCheckpointManager):
    """Lets Ray delete blocks whose writing was cut off, but not filter finished rows.

    Its filter is an actor of a whole CPU and 1 GiB, up to ten of them: a small cluster that could
    start a job could not resume it.
    """

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: Any = None
    ) -> tuple[None, int]:
        """Clean up, and say that there is nothing to filter by."""
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0


def _refuse_unprotected(rows: "ray.data.Dataset") -> None:
    """Raise ConfigError unless the plan starts with a read, where Ray can filter finished ids."""
    operator, names = rows._logical_plan.dag, []
    while True:
        names.append(type(operator).__name__)
        if not operator.input_dependencies:
            break
        operator = operator.input_dependencies[0]
    if names[-1] != "Read" and names[-2:] != ["ReadFiles", "ListFiles"]:
        raise ConfigError(
            f"the plan starts with {names[-1]}; only a plan that reads files is resumed exactly. "
            "Write the index as Parquet first."
        )


@contextmanager
def plain_data() -> Iterator[None]:
    """Keep Ray Data quiet (our bars count rows) and its errors whole, for datasets made inside."""
    with _set(
        enable_progress_bars=False,
        raise_original_map_exception=True,
        # The newer reader starts up to 32 actors to look at Parquet footers: a minute on two
        # cores, and our indexes are a few small files.
        use_datasource_v2=False,
    ):
        yield


@contextmanager
def _protected(checkpoint: Storage) -> Iterator[None]:
    """Set Ray's checkpoint for the datasets made inside."""
    filesystem, path = checkpoint.arrow()
    config = CheckpointConfig(
        id_column="id",
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=_PendingBlocks,
    )
    with plain_data(), _set(checkpoint_config=config):
        yield


@contextmanager
def _set(**wanted: Any) -> Iterator[None]:
    """Set fields of Ray Data's context, and put them back."""
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _pending(checkpoint: Storage) -> list[str]:
    """Return the notes of blocks that were being written when the last run died."""
    return [path for path in checkpoint.list() if path.endswith(_PENDING)]


def _finished(checkpoint: Storage) -> pa.Array:
    """Return the ids of the blocks that were written whole.

    Read from the notes and not from the rows: a killed task leaves half a Parquet file, which
    Ray deletes with its pending note when the plan starts again.
    """
    filesystem, path = checkpoint.arrow()
    names = [
        one for one in checkpoint.list() if one.endswith(".parquet") and not one.endswith(_PENDING)
    ]
    if not names:
        return pa.array([], pa.string())
    files = [f"{path}/{name}" for name in names]
    notes = dataset.dataset(files, format="parquet", filesystem=filesystem)
    return pc.unique(notes.to_table(columns=["id"])["id"]).cast(pa.string())


def verify(wanted: pa.ChunkedArray, found: pa.ChunkedArray, *, where: str) -> None:
    """Raise ArtifactCorrupt unless `found` holds every id of `wanted` exactly once."""
    counts = pc.value_counts(found)
    double = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    missing = wanted.filter(pc.invert(pc.is_in(wanted, value_set=found)))
    foreign = found.filter(pc.invert(pc.is_in(found, value_set=wanted)))
    problems = [
        f"{len(ids)} ids {what}, e.g. {', '.join(map(str, ids[:3].to_pylist()))}"
        for what, ids in (("missing", missing), ("double", double), ("not in the index", foreign))
        if len(ids)
    ]
    if problems:
        raise ArtifactCorrupt(
            f"{where}: {'; '.join(problems)}. Nothing was committed. "
            "Make another version (--out.version v2), or delete both folders and run again."
        )
