# SPDX-License-Identifier: Apache-2.0
"""Leases: the right to write an artifact, as numbered claims made by conditional create.

Claim n is the object `lease/<n>.json`; it is never changed. The writer is the highest claim; its
heartbeats and its release are the object `lease/beats/<token>.json`, so an old writer that wakes
up overwrites nothing of its successor, also where the folder was deleted and started again. A new
writer may add the next number only when the highest claim was released, its process is dead (same
machine), or its heartbeat did not change for `ttl_s`. Clocks of two machines are never compared.
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

from sg4v_ray.core.errors import LeaseHeld, LeaseLost, StorageError
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage

_log = logging.getLogger(__name__)
_FOLDER = "lease"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseTiming:
    """Intervals that decide when a dead writer is replaced."""

    ttl_s: float = 30.0
    """Seconds without a new heartbeat after which a writer counts as dead."""
    heartbeat_s: float = 5.0
    """Seconds between two heartbeats; several must fit into `ttl_s`."""


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


def claims(storage: Storage) -> list[str]:
    """Return the paths of all claims, the newest last."""
    return [path for path in storage.list_folder(_FOLDER) if path.endswith(".json")]


def _number(path: str) -> int:
    return int(Path(path).stem)


def beat_path(token: str) -> str:
    """Return the path of the heartbeats of a claim."""
    return f"{_FOLDER}/beats/{token}.json"


def is_dead_here(claim: dict[str, str]) -> bool:
    """Return True if the process of a claim ran on this machine and is gone."""
    if claim.get("machine") != _machine():
        return False
    return _start_ticks(int(claim["pid"])) != claim["started"]


def last_beat(storage: Storage, path: str) -> bytes:
    """Return the last heartbeat of a claim; the claim itself before the first one.

    Claims of version 0.1 have their heartbeat and state inside.
    """
    data = storage.get(path)
    beat = beat_path(json.loads(data).get("token", ""))
    return storage.get(beat) if storage.exists(beat) else data


def _stood_still(storage: Storage, path: str, timing: LeaseTiming) -> bool:
    """Poll a heartbeat for `ttl_s`; return True if it never changed and was not released."""
    before = last_beat(storage, path)
    deadline = time.monotonic() + timing.ttl_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        pause.wait(min(timing.heartbeat_s, max(0.0, deadline - time.monotonic())))
        if last_beat(storage, path) != before:
            return False
    return True


def refuse_overtaken(storage: Storage, number: int) -> None:
    """Raise LeaseLost if a writer after `number` exists. Costs one request.

    For processes of a job that have the number of its lease and do not hold the lease themselves.
    """
    newest = max(map(_number, claims(storage)), default=number)
    if newest > number:
        raise LeaseLost(
            f"writer {newest} took over {storage.root}; this one was writer {number}. Nothing more "
            "was sent; let the other job finish."
        )


class Lease:
    """The right to write one artifact; made by `hold`."""

    def __init__(self, storage: Storage, number: int, timing: LeaseTiming) -> None:
        self.number = number
        self.token = uuid.uuid4().hex
        """Unique id of this writer."""
        self._storage, self._timing = storage, timing
        self._path = f"{_FOLDER}/{number:06d}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    def check(self) -> None:
        """Raise LeaseLost if this is no longer the newest writer. Call right before a commit."""
        newest = max(map(_number, claims(self._storage)), default=0)
        if newest > self.number:
            raise LeaseLost(
                f"writer {newest} took over {self._storage.root}; this one was writer "
                f"{self.number} and writes no manifest. Let the other job finish."
            )
        if newest < self.number or self._claimed_by() != self.token:
            raise LeaseLost(
                f"{self._storage.root} was deleted while this job wrote to it. No manifest was "
                "written; if another job writes there now, let it finish."
            )

    def _claimed_by(self) -> str | None:
        try:
            claim: dict[str, str] = json.loads(self._storage.get(self._path))
        except StorageError:
            return None
        return claim.get("token")

    def _claim(self) -> bool:
        claim = {
            "token": self.token,
            "machine": _machine(),
            "pid": str(os.getpid()),
            "started": _start_ticks(os.getpid()),
        }
        return self._storage.create(self._path, json.dumps(claim).encode())

    def _put_beat(self, state: str) -> None:
        beat = {"state": state, "beat": uuid.uuid4().hex}
        self._storage.put(beat_path(self.token), json.dumps(beat).encode())

    def _beat(self) -> None:
        while not self._stop.wait(self._timing.heartbeat_s):
            try:
                self._put_beat("held")
            except STORAGE_ERRORS as error:
                # One missed heartbeat is no death. After `ttl_s` without any, another writer may
                # take over, and `check` fails.
                _log.warning("no heartbeat of the lease on %s: %s", self._storage.root, error)

    def _start(self) -> None:
        self._thread.start()

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self._claimed_by() == self.token:
                self._put_beat("released")
        except STORAGE_ERRORS as error:
            # Not raised: it would replace the error that ended the job.
            _log.warning(
                "the lease on %s was not released (%s); the next job waits %g s for it",
                self._storage.root, error, self._timing.ttl_s,
            )  # fmt: skip


def may_follow(storage: Storage, path: str, timing: LeaseTiming) -> bool:
    """Return True if the writer of a claim has ended; waits up to `ttl_s` for a heartbeat."""
    claim, beat = json.loads(storage.get(path)), json.loads(last_beat(storage, path))
    if beat.get("state") == "released" or is_dead_here(claim):
        return True
    _log.info("another job holds %s; waiting for its heartbeat", storage.root)
    return _stood_still(storage, path, timing)


def _writer(storage: Storage, path: str) -> str:
    claim = json.loads(storage.get(path))
    machine = claim.get("machine", "").partition("/")[0]
    return f"claim {_number(path)}, process {claim.get('pid', 'unknown')} on {machine or 'unknown'}"


@contextmanager
def hold(storage: Storage, *, timing: LeaseTiming | None = None) -> Iterator[Lease]:
    """Hold the right to write the artifact at `storage` for the length of a `with` block.

    Raises:
        LeaseHeld: another writer is alive. Two drivers on one artifact would do all work twice.
    """
    timing = timing or LeaseTiming()
    held = claims(storage)
    newest = max(map(_number, held), default=0)
    if held and not may_follow(storage, held[-1], timing):
        raise LeaseHeld(
            f"another job is writing {storage.root} ({_writer(storage, held[-1])}). Wait for it or "
            f"stop it; a dead job is detected after {timing.ttl_s:g} s."
        )
    lease = Lease(storage, newest + 1, timing)
    if not lease._claim():
        raise LeaseHeld(f"another job started to write {storage.root} just now; let it finish")
    lease._start()
    try:
        yield lease
    finally:
        lease._release()
