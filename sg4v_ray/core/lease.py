# SPDX-License-Identifier: Apache-2.0
"""Who may write an artifact: numbered claims made by conditional create, kept alive, fenced.

Claim n is the object `lease/<n>.json`. The writer is the highest claim; a new writer may add the
next number only when the highest was released, its process is dead (same machine), or its
heartbeat did not change while we watched for `ttl_s`. Clocks of two machines are never compared.
Before a commit the writer checks that it is still the highest (`check`): a driver that was
silent and overtaken raises LeaseLost and cannot commit.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sg4v_ray.core.errors import LeaseHeld, LeaseLost
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage

_log = logging.getLogger(__name__)
_FOLDER = "lease"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseTiming:
    """How fast a dead writer is noticed."""

    ttl_s: float = 30.0
    """A heartbeat that stands still this long means that its writer is dead."""
    heartbeat_s: float = 5.0
    """How often the writer renews; several must fit in `ttl_s`."""


def _machine() -> str:
    """Name this boot of this machine and this container, so that a process id means something."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = (
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(space) if space.is_symlink() else "",
    )
    return "/".join(parts)


def _start_ticks(pid: int) -> str:
    """Return when a process started (clock ticks since boot), or '' if it is not running."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _claims(storage: Storage) -> list[str]:
    return [path for path in storage.list(_FOLDER) if path.endswith(".json")]


def _number(path: str) -> int:
    return int(Path(path).stem)


def _is_dead_here(claim: dict[str, str]) -> bool:
    """Say whether the claim's process ran on this machine and is gone."""
    if claim["machine"] != _machine():
        return False
    return _start_ticks(int(claim["pid"])) != claim["started"]


def _stood_still(storage: Storage, path: str, timing: LeaseTiming) -> bool:
    """Watch a heartbeat for `ttl_s`; return True if it never changed and was not released."""
    before = storage.get(path)
    deadline = time.monotonic() + timing.ttl_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        pause.wait(min(timing.heartbeat_s, max(0.0, deadline - time.monotonic())))
        if storage.get(path) != before:
            return False
    return True


def refuse_overtaken(storage: Storage, number: int) -> None:
    """Raise LeaseLost if the writer after `number` exists. Cheap: one look at one object.

    For processes of a job that know their writer's number and do not hold the lease themselves.
    """
    if storage.exists(f"{_FOLDER}/{number + 1:06d}.json"):
        raise LeaseLost(
            f"writer {number + 1} took over {storage.root}; this one was writer {number}. Nothing "
            "more was sent; let the other job finish."
        )


class Lease:
    """The right to write one artifact; made by `hold`."""

    def __init__(self, storage: Storage, number: int, timing: LeaseTiming) -> None:
        self.number = number
        self._storage, self._timing = storage, timing
        self._path = f"{_FOLDER}/{number:06d}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    def check(self) -> None:
        """Raise LeaseLost if a newer writer exists. Call right before a commit."""
        newest = max(_number(path) for path in _claims(self._storage))
        if newest != self.number:
            raise LeaseLost(
                f"writer {newest} took over {self._storage.root}; this one was writer "
                f"{self.number}. Nothing was committed; let the other job finish."
            )

    def _body(self, state: str) -> bytes:
        return json.dumps(
            {
                "machine": _machine(),
                "pid": str(os.getpid()),
                "started": _start_ticks(os.getpid()),
                "state": state,
                "beat": uuid.uuid4().hex,
            }
        ).encode()

    def _beat(self) -> None:
        while not self._stop.wait(self._timing.heartbeat_s):
            try:
                self._storage.put(self._path, self._body("held"))
            except STORAGE_ERRORS as error:
                # One missed beat is no death. After `ttl_s` of them another may take over, and
                # `check` tells this writer.
                _log.warning("no heartbeat of the lease on %s: %s", self._storage.root, error)

    def _start(self) -> None:
        self._thread.start()

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        self._storage.put(self._path, self._body("released"))

    def _claim(self) -> bool:
        return self._storage.create(self._path, self._body("held"))


def _may_follow(storage: Storage, path: str, timing: LeaseTiming) -> bool:
    claim = json.loads(storage.get(path))
    if claim["state"] == "released" or _is_dead_here(claim):
        return True
    _log.info("another writer holds %s; watching its heartbeat", storage.root)
    return _stood_still(storage, path, timing)


@contextmanager
def hold(storage: Storage, *, timing: LeaseTiming | None = None) -> Iterator[Lease]:
    """Hold the right to write the artifact at `storage` for the length of a `with` block.

    Raises:
        LeaseHeld: another writer is alive. Two drivers on one artifact would caption twice and
            delete each other's checkpoints.
    """
    timing = timing or LeaseTiming()
    claims = _claims(storage)
    newest = max((_number(path) for path in claims), default=0)
    if claims and not _may_follow(storage, claims[-1], timing):
        raise LeaseHeld(
            f"another job is writing {storage.root} (claim {newest}). Wait for it or stop it; "
            f"a dead one is noticed after {timing.ttl_s:g} s."
        )
    lease = Lease(storage, newest + 1, timing)
    if not lease._claim():
        raise LeaseHeld(f"another job started writing {storage.root} just now; let it finish")
    lease._start()
    try:
        yield lease
    finally:
        lease._release()
