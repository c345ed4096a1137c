# SPDX-License-Identifier: Apache-2.0
"""A desk for the time of one job: the root's ledger is held, and nothing stays on its way."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Final, TypeAlias

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sg4v_ray.captions.batches import BatchLimits
from sg4v_ray.captions.ledger import Lost
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.captions.teacher import Endpoint, TeacherConfig
from sg4v_ray.captions.teacher_actor import AT_DESK, DeskStatus, TeacherDesk
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.lease import hold
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where

_log = logging.getLogger(__name__)

LEDGER: Final = "teacher-ledger"
"""Folder below the root with all that was ever sent to teachers."""
LOST: Final = "lost.json"
"""File of an artifact: the requests that may have been paid for without an answer."""
DeskHandle: TypeAlias = "ray.actor.ActorHandle[TeacherDesk]"
_NAMED: Final = 10
"""Rows that a warning names; the file has all."""


@contextmanager
def desk_of(
    config: TeacherConfig,
    endpoint: Endpoint,
    *,
    quality: QualityConfig,
    batch: BatchLimits,
    out: Ref,
    where: Where,
) -> Iterator["DeskHandle"]:
    """Hold the root's ledger and a desk while the block runs.

    However the block ends, short of a kill, what is on its way is waited for and stored.

    Raises:
        LeaseHeld: another collection below this root is running.
    """
    ledger = where.storage.sub(LEDGER)
    # On the driver's node: no other node takes it down with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_concurrency=AT_DESK, scheduling_strategy=here)
    with hold(ledger) as lease:
        desk = remote(TeacherDesk).remote(
            config=config,
            endpoint=endpoint,
            quality=quality,
            batch=batch,
            ledger_root=ledger.root,
            writer=lease.number,
            job=str(out),
        )
        try:
            _warn_of_lost(get(desk.open.remote()))
            yield desk
        finally:
            try:
                _close(desk, where.storage.sub(out.path))
            finally:
                ray.kill(desk)


def _close(desk: "DeskHandle", home: Storage) -> None:
    """Wait for what is on its way and say what was lost in all runs."""
    try:
        if not get(desk.is_open.remote()):
            return
        status: DeskStatus = get(desk.status.remote())
        if status.on_their_way:
            _log.warning("waiting for %d answers on their way", status.on_their_way)
        get(desk.stop.remote())
        status = get(desk.status.remote())
    except RayActorError as error:
        _log.warning("the process that asks the teacher is gone: %s", error)
        return
    lost = [asdict(one) for one in status.lost]
    home.put(LOST, (json.dumps(lost, indent=1) + "\n").encode())
    counts = ", ".join(f"{count} {name}" for name, count in sorted(status.outcomes.items()))
    _log.info(
        "%d requests sent (%s), %d answers were there; $%.4f of all runs, of it $%.4f for %d "
        "requests without an answer (%s)",
        status.sent,
        counts or "none",
        status.known,
        status.spent_usd,
        sum(one.usd for one in status.lost),
        len(lost),
        home.uri(LOST),
    )


def _warn_of_lost(lost: list[Lost]) -> None:
    if lost:
        _log.warning(
            "%d requests were on their way when an earlier job ended; their images are asked again "
            "and may be paid twice, $%.4f at most: %s%s",
            len(lost),
            sum(one.usd for one in lost),
            ", ".join(one.row for one in lost[:_NAMED]),
            ", ..." if len(lost) > _NAMED else "",
        )


def get(answer: "ray.ObjectRef[Any]") -> Any:
    """Get an actor's answer; what it raised on purpose comes as itself."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Sg4vError) else error) from None


class PaidSoFar:
    """What all runs have paid, as a desk tells it; the last that was told once it is gone."""

    def __init__(self, desk: "DeskHandle") -> None:
        self._desk, self._usd = desk, 0.0

    def __call__(self) -> float:
        """Return dollars."""
        with suppress(RayActorError):  # the job ends by what its rows meet, and says why
            self._usd = float(ray.get(self._desk.spent_usd.remote()))
        return self._usd
