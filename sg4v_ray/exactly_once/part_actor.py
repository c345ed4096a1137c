# SPDX-License-Identifier: Apache-2.0
"""The Ray Data actor that processes whole parts and commits each of them.

    part -> slices of index rows -> decode tasks -> `process` of a subclass -> one Parquet object

Decode tasks run on any node. The actor starts them itself, so that at most `rows_in_flight` rows of
all its parts are decoded or being processed at once, whatever the size of a part. They start while
the actor loads its engine.
"""

import asyncio
import functools
import json
import threading
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from sg4v_ray.core.artifact import software_versions
from sg4v_ray.core.errors import ArtifactCorrupt, Sg4vError
from sg4v_ray.core.records import check_columns, schema
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.row_files import RowIndex, hash_ids, read_table
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.deaths import cause_of_death
from sg4v_ray.exactly_once.loop_thread import LoopThread
from sg4v_ray.exactly_once.parts import (
    Part,
    PartFooter,
    encode_part,
    figures_of,
    read_footer,
)
from sg4v_ray.exactly_once.poison import Life
from sg4v_ray.exactly_once.progress import ProgressActor, send_heartbeats
from sg4v_ray.inference.engine import EngineStats

Prepare = Callable[[pa.Table], pa.Table]
_DECODER_CRASHED: Final = "the decode process crashed each time it was given this image alone"
_NO_FILE: Final = "/dev/null/none"
_INDEX_FILES_KEPT: Final = 2
"""Index files in memory of an actor: parts come in order, so two are enough at a border."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartJob:
    """Everything that the actors of one attempt share."""

    index: RowIndex
    index_sha256: str
    out: Storage
    """Folder of the attempt."""
    identity: str
    """Fingerprint of the artifact and the attempt."""
    prepare: Prepare
    """Decode step: a slice of index rows in, a table with `image` and `reject` out."""
    record: type
    """Record class of the rows that come out."""
    decode_cpus: float
    rows_per_task: int
    """Rows of one decode task, at most `rows_in_flight`."""
    decode_tasks: int
    """Decode tasks of one actor at once."""


class RowSemaphore:
    """A first-in first-out semaphore that counts rows. For one event loop."""

    def __init__(self, rows: int) -> None:
        self._free = rows
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, rows: int) -> None:
        """Wait until `rows` (never more than all) are free, in the order of the calls."""
        if not self._waiting and rows <= self._free:
            self._free -= rows
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(rows)
            raise

    def release(self, rows: int) -> None:
        """Give rows back."""
        self._free += rows
        while self._waiting:
            rows, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if rows > self._free:
                return
            self._waiting.popleft()
            self._free -= rows
            turn.set_result(None)


class PartActor(ABC):
    """Base of all work actors: processes parts, several at once, and commits each."""

    def __init__(
        self,
        *,
        job: PartJob,
        rows_in_flight: int,
        progress: "ray.actor.ActorHandle[ProgressActor]",
    ) -> None:
        self._job, self._progress = job, progress
        self._name = str(ray.get_runtime_context().get_actor_id())
        self._rows_in_flight = RowSemaphore(rows_in_flight)
        self._decoding = asyncio.Semaphore(job.decode_tasks)
        self._software = software_versions()
        self._schema = schema(job.record)
        self._reading = threading.Lock()
        self._index_file = functools.lru_cache(_INDEX_FILES_KEPT)(self._read_index_file)
        self._loop = LoopThread("parts")
        _report_start(progress, self._name)
        self._loop.submit(send_heartbeats(progress, self._name, self.stats))
        self._decode = decode_task.options(num_cpus=job.decode_cpus, name=f"decode {job.out.root}")
        self._loading = self._loop.submit(self._load())

    async def load(self) -> None:  # noqa: B027  most actors have an engine, some have none
        """Load the engine that `process` needs; no call of `process` begins before its end.

        Runs on the actor's own event loop. A subclass sets its attributes before
        `PartActor.__init__`, which starts this.
        """

    @abstractmethod
    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        """Turn prepared rows into rows of the record class, in any order of columns.

        Runs on the actor's own event loop, several calls at once.

        Args:
            release_row: to be called when the image of a row is no longer referenced, at most once
                for each row; another row is then decoded. The others are released at the end.
        """

    def stats(self) -> EngineStats | None:
        """Return the present load, or None while the actor loads."""
        return EngineStats(running=1, waiting=0, decode_steps=0)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Process the part in `batch` unless its object exists; yield its figures."""
        (row,) = batch.to_pylist()
        name = row.pop("name")
        # On a loop of its own: Ray Data blocks the actor's loop while its output queue is full.
        work = self._loop.submit(self._finish(Part(**row), name))
        try:
            footer = await asyncio.wrap_future(work)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Sg4vError) else error) from None
        if footer is None:
            return
        figures = footer.figures
        yield pa.table(
            {
                "part": [footer.part],
                "rows": [figures.rows],
                "tokens": [figures.tokens],
                "rejects": [json.dumps(figures.rejects)],
            }
        )

    async def _finish(self, part: Part, name: str) -> PartFooter | None:
        """Return the footer of the committed part; None if its object is damaged."""
        if await asyncio.to_thread(self._job.out.exists, name):
            return await asyncio.to_thread(self._committed, name)
        rows = await asyncio.to_thread(self._rows_of, part)
        step = self._job.rows_per_task
        slices = [rows.slice(first, step) for first in range(0, len(rows), step)]
        table = pa.concat_tables(await _all(self._process_slice(one) for one in slices))
        return await asyncio.to_thread(self._commit, part, name, rows["id"], table)

    async def _process_slice(self, rows: pa.Table) -> pa.Table:
        held = len(rows)
        await self._rows_in_flight.acquire(held)

        def release_row() -> None:
            nonlocal held
            if held:  # rows of a slice that failed may end after it
                held -= 1
                self._rows_in_flight.release(1)

        try:
            # No variable here: `process` holds the only reference to the images.
            return self._as_record(await self.process(await self._decoded(rows), release_row))
        finally:
            self._rows_in_flight.release(held)
            held = 0

    async def _decoded(self, rows: pa.Table) -> pa.Table:
        async with self._decoding:
            prepared = await decoded(self._decode, self._job.prepare, rows)
        # Shielded: the cancellation of a slice must not end the load for all others.
        await asyncio.shield(asyncio.wrap_future(self._loading))
        return prepared

    async def _load(self) -> None:
        await self.load()
        self._progress.ready.remote(self._name)

    def _as_record(self, table: pa.Table) -> pa.Table:
        check_columns(table.schema, self._job.record, where=type(self).__name__)
        return table.select(self._schema.names).cast(self._schema)

    def _rows_of(self, part: Part) -> pa.Table:
        with self._reading:  # one reader at a time: the others then find the file in memory
            table = self._index_file(part.file)
        rows = table.slice(part.first, part.rows)
        if len(rows) != part.rows:
            raise ArtifactCorrupt(
                f"{self._job.index.folder.uri(self._job.index.files[part.file].path)} has fewer "
                "rows than its manifest lists; restore it from a copy"
            )
        return rows

    def _read_index_file(self, number: int) -> pa.Table:
        return read_table(self._job.index.folder, self._job.index.files[number].path, None)

    def _committed(self, name: str) -> PartFooter | None:
        try:
            return read_footer(self._job.out, name)
        except ValueError:
            # The commit reports damaged objects and asks for the part under its next name.
            return None

    def _commit(
        self, part: Part, name: str, ids: pa.ChunkedArray, table: pa.Table
    ) -> PartFooter | None:
        """Create the object of a part; if another writer was first, return its footer."""
        if not table["id"].equals(ids):
            raise ArtifactCorrupt(f"{type(self).__name__} changed the ids of part {part.number}")
        writer = uuid.uuid4().hex
        footer = PartFooter(
            part=part.number,
            writer=writer,
            identity=self._job.identity,
            index_sha256=self._job.index_sha256,
            ids_sha256=hash_ids(ids),
            figures=figures_of(table),
            software=self._software,
        )
        out = self._job.out

        def is_own() -> bool:
            try:
                return read_footer(out, name).writer == writer
            except ValueError:
                return False

        if out.create(name, encode_part(table, footer), is_own=is_own):
            return footer
        return self._committed(name)


def without_images(rows: pa.Table) -> pa.Table:
    """Return a copy of prepared rows without their images.

    A table from the object store is a view of its object: any column of it keeps all images there.
    """
    rows = rows.drop_columns(["image"])
    return rows.take(pa.array(range(len(rows)), pa.int64()))


def _report_start(progress: "ray.actor.ActorHandle[ProgressActor]", name: str) -> None:
    """Report this process of an actor, and the cause of death of the one before."""
    previous: Life | None = ray.get(progress.previous_life.remote(name))
    death = None if previous is None else cause_of_death(previous.worker_id, previous.node_id)
    context = ray.get_runtime_context()
    life = Life(context.get_worker_id(), context.get_node_id())
    ray.get(progress.report_start.remote(name, life, death))


async def _all(work: Iterable[Coroutine[Any, Any, pa.Table]]) -> list[pa.Table]:
    """Run coroutines at once; the first error cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@ray.remote(max_retries=3)
def decode_task(prepare: Prepare, rows: pa.Table) -> pa.Table:
    """Run the decode step on index rows in a worker process."""
    return prepare(rows)


async def decoded(task: Any, prepare: Prepare, rows: pa.Table) -> pa.Table:
    """Run the decode step in a worker process; reject an image that crashes that process.

    Args:
        task: `decode_task` with its options.
    """
    try:
        table: pa.Table = await task.remote(prepare, rows)
        return table
    except WorkerCrashedError:
        if len(rows) > 1:  # find the image that crashes the decoder
            singles = [rows.slice(place, 1) for place in range(len(rows))]
            return pa.concat_tables([await decoded(task, prepare, single) for single in singles])
    # Never decoded here. A path without a file gives a reject with all columns of the step.
    column = rows.column_names.index("uri")
    prepared = prepare(rows.set_column(column, "uri", pa.array([_NO_FILE])))
    return _rejected(prepared, rows, _DECODER_CRASHED)


def _rejected(prepared: pa.Table, rows: pa.Table, detail: str) -> pa.Table:
    """Return one prepared row as a reject of the row in `rows`."""
    values = {"reject": Reject.CORRUPT.value, "reject_detail": detail}
    for name in prepared.column_names:
        if name in values or (name in rows.column_names and name == "uri"):
            column = pa.array([values.get(name) or rows[name][0].as_py()], prepared[name].type)
            prepared = prepared.set_column(prepared.column_names.index(name), name, column)
    return prepared
