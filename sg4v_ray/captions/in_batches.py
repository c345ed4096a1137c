# SPDX-License-Identifier: Apache-2.0
"""The batch mode of a collection: every image goes to the desk's batches, and all are waited for.

How far they are is shown by a bar, and by `status.json` beside the rows.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Never

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayActorError, WorkerCrashedError
from tqdm import tqdm

from sg4v_ray.captions.session import DeskHandle, get
from sg4v_ray.captions.teacher_actor import COLUMNS, DeskStatus
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.row_files import read_tables
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.capacity import check_cluster_capacity
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.exactly_once.monitor import STATUS, Status
from sg4v_ray.exactly_once.part_actor import decode_task, decoded
from sg4v_ray.exactly_once.stage import Stage

_log = logging.getLogger(__name__)

_LOOK_S: Final = 5.0
"""How often the desk is asked how far its batches are."""
_SLICES_AHEAD: Final = 8
"""Decode tasks that run while the desk takes a slice."""
_NO_REJECTS: Final = ("caption", "lost", "turned_away")


class BatchProgress:
    """The progress of one run while it waits for batches."""

    def __init__(self, home: Storage, *, name: str, total: int, show: bool) -> None:
        """Begin a bar.

        Args:
            home: the artifact's folder.
            total: requests that are waited for.
        """
        self._home, self._total = home, total
        self._began_s = time.monotonic()
        self._bar: tqdm[Never] = tqdm(
            total=total,
            desc=f"{name} in batches",
            unit="row",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not show,
        )

    def tell(self, desk: DeskStatus, *, state: str = "in batches") -> None:
        """Show and write what a desk says now."""
        status = self.status(desk, time.monotonic() - self._began_s, state)
        self._bar.set_postfix_str(
            f"{desk.batches.batches} batches under way, ${desk.spent_usd:.2f} so far", refresh=False
        )
        self._bar.n = status.done
        self._bar.refresh()
        self._home.put(STATUS, (json.dumps(asdict(status), indent=1) + "\n").encode())

    def status(self, desk: DeskStatus, seconds: float, state: str) -> Status:
        """Return what is known now; rates are of this run so far."""
        done = min(desk.batches.answered, self._total)
        rate = desk.batches.new / seconds if seconds > 0 else 0.0
        runs = rate > 0 and state != "stopped"
        rejected = {name: count for name, count in desk.outcomes.items() if name not in _NO_REJECTS}
        paid = desk.spent_usd
        return Status(
            state=state,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
            done=done,
            total=self._total,
            rejected=dict(sorted(rejected.items())),
            rows_per_s=round(rate, 2),
            tokens_per_s=None,
            eta_s=round((self._total - done) / rate, 1) if runs else None,
            actors=0,
            ready_actors=0,
            queue=desk.batches.requests - done,
            engine_busy_rate=0.0,
            usd_so_far=round(paid, 4),
            usd_expected=None,
        )

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def ask_in_batches(
    stage: Stage,
    prepare: Callable[[pa.Table], pa.Table],
    *,
    desk: DeskHandle,
    where: Where,
    batching: Batching,
) -> None:
    """Put every image into the desk's batches; their answers are then in the ledger."""
    check_cluster_capacity(where)
    with _progress(stage.out, desk, where, stage.index.rows) as wait:
        for table in _prepared(stage, prepare, where, batching.rows_per_task):
            good = table.filter(pc.is_valid(table["image"])).select(COLUMNS)
            wait(desk.put_into_batches.remote(good.to_pylist(), 1))
        wait(desk.finish_batches.remote())


def _prepared(
    stage: Stage, prepare: Callable[[pa.Table], pa.Table], where: Where, rows_per_task: int
) -> Iterator[pa.Table]:
    """Yield the prepared rows of an index in order; some slices ahead are decoded in tasks."""
    decode = decode_task.options(num_cpus=where.decode_cpus)
    slices = (
        table.slice(first, rows_per_task)
        for table in read_tables(stage.index.folder, stage.index.files, None)
        for first in range(0, len(table), rows_per_task)
    )
    ahead = [(rows, decode.remote(prepare, rows)) for rows in islice(slices, _SLICES_AHEAD)]
    while ahead:
        rows, answer = ahead.pop(0)
        try:
            table = get(answer)
        except WorkerCrashedError:
            table = asyncio.run(decoded(decode, prepare, rows))
        ahead += [(rows, decode.remote(prepare, rows)) for rows in islice(slices, 1)]
        yield table


def wait_for_earlier_batches(out: Ref, desk: DeskHandle, where: Where) -> None:
    """Wait for batches of an earlier run: their images would be asked, and paid, a second time."""
    under_way = get(desk.status.remote()).batches
    if under_way.batches:
        _log.warning("waiting for %d batches of an earlier run", under_way.batches)
        with _progress(out, desk, where, under_way.requests) as wait:
            wait(desk.finish_batches.remote())


@contextmanager
def _progress(
    out: Ref, desk: DeskHandle, where: Where, total: int
) -> Iterator[Callable[["ray.ObjectRef[Any]"], None]]:
    """Yield what waits for a call at the desk and shows meanwhile how far its batches are."""
    home = where.storage.sub(out.path)
    shown = BatchProgress(home, name=str(out), total=total, show=where.progress)
    told_s = -_LOOK_S

    def wait(answer: "ray.ObjectRef[Any]") -> None:
        nonlocal told_s
        while True:
            there, _ = ray.wait([answer], timeout=_LOOK_S)
            if time.monotonic() - told_s >= _LOOK_S:
                shown.tell(get(desk.status.remote()))
                told_s = time.monotonic()
            if there:
                break
        get(answer)

    state = "stopped"
    try:
        yield wait
        state = "in batches"  # the plan goes on from here
    finally:
        with suppress(RayActorError):  # a desk that died has said so
            shown.tell(get(desk.status.remote()), state=state)
        shown.close()
