# SPDX-License-Identifier: Apache-2.0
"""Storage requests of a job as events: named in a way that repeats from run to run, and killed at.

Each request of each process of a run is reported before it starts and after the store has answered.
The process waits for the controller, so a kill hits it exactly there.
"""

import json
import os
import re
import signal
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Victim = Literal["driver", "actor", "all", "connection"]
Phase = Literal["before", "written", "linked", "after"]
"""`written` and `linked` are inside a local create: before link(2), and right after it."""

_NUMBERS = re.compile(r"\b[0-9a-f]{32}\b|\d{8}T\d+|\d{5,}")
_SERVICES = re.compile(
    r"ray::(IDLE|_StatsActor|_AutoscalingCoordinator|AutoscalingCoordinator|_UsageCollection"
    r"|ActorLocationTracker|DashboardAgent|RuntimeEnvAgent)"
)
"""Processes of the cluster that belong to no job."""


@dataclass(frozen=True, order=True)
class Request:
    """A storage request by what repeats from run to run."""

    step: str
    """index, caption, retry, or commit for the creation of their manifests."""
    role: str
    """The process: driver, actor, decode or other."""
    operation: str
    """put, create, get, head or list."""
    kind: str
    """Path below the run with ids and numbers replaced by `*`."""


@dataclass(frozen=True, order=True)
class Moment:
    """A phase of the n-th request of its name in a run."""

    request: Request
    phase: str
    number: int


@dataclass(frozen=True, order=True)
class Point:
    """A moment, and the victim of its kill."""

    store: str
    victim: str
    moment: Moment

    def __str__(self) -> str:
        at = self.moment
        return (
            f"{self.store}: {self.victim} {at.phase} #{at.number} {at.request.operation} "
            f"{at.request.kind} by the {at.request.role} in {at.request.step}"
        )

    def plain(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@dataclass
class Run:
    """One process tree of a job, from its start to its end or kill."""

    name: str
    """First component of its paths below the folder or bucket of all runs."""
    point: Point | None = None
    driver: int = 0
    is_over: bool = False
    """The kill or cut happened; later requests are not counted."""
    trace: list[Moment] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    step: str = "index"
    actor: int = 0
    counts: Counter[tuple[Request, str]] = field(default_factory=Counter)


class Controller:
    """Receives the events of all processes and kills at the point of the current run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.run: Run | None = None
        self.raylet = 0
        """Its children are the workers of all drivers."""

    def processes(self) -> list[int]:
        """Return the driver and the workers, which send the requests."""
        with self._lock:  # not before the driver of a new run is known
            run = self.run
        return [*([run.driver] if run else []), *children(self.raylet)]

    @contextmanager
    def starting(self, run: Run) -> Iterator[None]:
        """Make a run the current one; hold its events back until its driver is known."""
        with self._lock:
            self.run = run
            yield

    def report(self, path: str, pid: int, operation: str, phase: str) -> bool:
        """Record an event and kill if it is the point; return True to cut the connection.

        Args:
            path: relative to the folder or bucket of all runs.
        """
        with self._lock:
            run = self.run
            name, _, below = path.partition("/")
            if run is None or name != run.name or pid in run.killed:
                return False
            moment = self._moment(run, below, pid, operation, phase)
            if moment is None or run.is_over:
                return False
            run.trace.append(moment)
            _advance(run, moment)
            if run.point is None or run.point.moment != moment:
                return False
            run.is_over = True
            if run.point.victim == "connection":
                return True
            run.killed = self._victims(run, run.point.victim)
            for one in run.killed:
                _kill(one)
            return False

    def _moment(self, run: Run, below: str, pid: int, operation: str, phase: str) -> Moment | None:
        role = self._role(run, pid)
        if role == "actor":
            run.actor = pid
        kind = _kind(below)
        step = "commit" if operation == "create" and "manifest" in kind else run.step
        request = Request(step, role, operation, kind)
        run.counts[request, phase] += 1
        return Moment(request, phase, run.counts[request, phase])

    def _role(self, run: Run, pid: int) -> str:
        if pid == run.driver:
            return "driver"
        title = command_line(pid)
        if "MapWorker" in title or "MapBatches" in title:
            return "actor"
        return "decode" if "decode" in title else "other"

    def _victims(self, run: Run, victim: str) -> list[int]:
        if victim == "driver":
            return [run.driver]
        workers = [one for one in children(self.raylet) if "ray::" in command_line(one)]
        if victim == "all":
            busy = [one for one in workers if not _SERVICES.match(command_line(one))]
            return [run.driver, *busy]
        return [run.actor] if run.actor in workers else []


def _advance(run: Run, moment: Moment) -> None:
    request = moment.request
    if request.step == "commit" and moment.phase == "after":
        run.step = "caption" if request.kind.startswith("images") else "retry"


def _kind(below: str) -> str:
    """Return a path without what differs from run to run."""
    if below.startswith("images"):
        return "image files"
    pieces = below.removeprefix("root/").split("/")
    if len(pieces) > 1 and pieces[1] == "v1":
        del pieces[1]
    return _NUMBERS.sub("*", "/".join(pieces)).rstrip("/")


def command_line(pid: int) -> str:
    """Return the title of a process; '' if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(one) for one in task.read_text().split()]
        except OSError:
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class ShimServer(socketserver.ThreadingUnixStreamServer):
    """Takes the events of the shim (local roots) from a Unix socket."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, socket: Path, folder: Path, controller: Controller) -> None:
        self.folder, self.controller = folder, controller
        super().__init__(str(socket), _ShimHandler)
        threading.Thread(target=self.serve_forever, name="shim", daemon=True).start()


class _ShimHandler(socketserver.StreamRequestHandler):
    server: ShimServer

    def handle(self) -> None:
        """Answer each event when its process may continue."""
        try:
            for line in self.rfile:
                event = json.loads(line)
                path = os.path.relpath(event["path"], self.server.folder)
                self.server.controller.report(
                    path, event["pid"], event["operation"], event["phase"]
                )
                self.wfile.write(b"go\n")
                self.wfile.flush()
        except (ConnectionError, ValueError):  # the process was killed, also within a line
            return
