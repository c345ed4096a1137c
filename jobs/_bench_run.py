# SPDX-License-Identifier: Apache-2.0
"""Common parts of the benches: a folder of their own, and processes that are measured or killed."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import psutil

from sg4v_ray.core.errors import ConfigError, Sg4vError

_MARKER: Final = ".sg4v-bench"
"""A file in each folder that a bench made, and so may empty."""
_PART_NAME: Final = re.compile(r"part-\d{6,}(?:\.r\d+)?\.parquet")
_POLL_S: Final = 0.2
_WORK_ACTOR: Final = "MapWorker"
"""Part of Ray's process name of an actor of the pool."""
_END_S: Final = 60.0
"""Limit for the end of the actors of a killed job."""
_NO_MORE: Final[Mapping[str, str]] = MappingProxyType({})


def empty(root: Path) -> None:
    """Make the bench's folder, without what an earlier bench left in it.

    Raises:
        ConfigError: no bench made this folder, so its files may be needed.
    """
    if root.exists() and any(root.iterdir()):
        if not (root / _MARKER).exists():
            raise ConfigError(f"--root {root} holds files that no bench wrote; name a new folder")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / _MARKER).touch()


def last_line(
    module: str,
    flags: Sequence[str],
    *,
    threads: int,
    more: Mapping[str, str] = _NO_MORE,
    cwd: Path | None = None,
) -> dict[str, Any]:
    """Run a module in a process of its own; print and return the JSON of its last line.

    Args:
        module: name of the module.
        flags: of its command line.
        threads: its OMP_NUM_THREADS.
        more: other variables of its environment.
        cwd: its working folder; None is that of this process.

    Raises:
        Sg4vError: it failed; its own error is above.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), **more}
    argv = [sys.executable, "-m", module, *flags]
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, text=True, env=environment, cwd=cwd, check=False
    )
    if done.returncode:
        part = " ".join([module, *flags])
        raise Sg4vError(f"{part} ended with exit code {done.returncode}; see above")
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    found: dict[str, Any] = json.loads(line)
    return found


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit of this repository into a folder.

    Raises:
        ConfigError: this is no clone with that commit.
    """
    argv = ["git", "-C", str(Path(__file__).parents[1]), "archive", "--format=tar", commit]
    try:
        packed = subprocess.run(argv, capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"commit {commit} is not in this clone, so nothing can be compared with it; run "
            "`git fetch --unshallow`, or measure without it (--old-rows 0)"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def part_objects(folder: Path) -> int:
    """Return how many part objects an attempt's folder holds, unfinished writes not counted."""
    if not folder.is_dir():
        return 0
    return sum(1 for name in os.listdir(folder) if _PART_NAME.fullmatch(name))


@dataclass(slots=True)
class KillableJob:
    """A job in a process of its own whose commits and memory are observed from outside."""

    process: "subprocess.Popen[bytes]"
    parts: Path
    """The attempt's folder."""
    started_s: float
    first_part_s: float | None = None
    """Seconds from the start of the process to its first part object."""
    last_part_s: float = 0.0
    """Seconds from the start of the process to its latest part object."""
    peak_mb: float = 0.0
    """Peak resident memory of the driver process (VmHWM)."""
    new_parts: int = 0
    _before: int = field(default=0, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds since the start of the process."""
        return time.monotonic() - self.started_s

    def poll(self) -> None:
        """Count part objects and read the peak memory once."""
        count = part_objects(self.parts) - self._before
        if count > self.new_parts:
            self.new_parts, self.last_part_s = count, self.seconds
            self.first_part_s = self.first_part_s or self.last_part_s
        self.peak_mb = max(self.peak_mb, peak_rss_mb(self.process.pid))

    def wait_for_parts(self, count: int) -> None:
        """Wait until the job has committed `count` parts.

        Raises:
            Sg4vError: it ended before.
        """
        while self.new_parts < count:
            if self.process.poll() is not None:
                raise Sg4vError("the job ended before it was killed; its error is above")
            self.poll()
            self._pause()

    def wait_for(self, file: Path) -> float:
        """Wait until a file exists; return the seconds from the start of the process.

        Raises:
            Sg4vError: the job ended without it.
        """
        while not file.exists():
            if self.process.poll() is not None and not file.exists():
                raise Sg4vError(f"the job ended without {file.name}; its error is above")
            self.poll()
            self._pause()
        seconds = self.seconds
        self.poll()
        return seconds

    def finish(self) -> None:
        """Wait for the end of the job.

        Raises:
            Sg4vError: it failed.
        """
        while self.process.poll() is None:
            self.poll()
            self._pause()
        if self.process.returncode:
            raise Sg4vError(f"the job ended with exit code {self.process.returncode}; see above")

    def kill(self) -> None:
        """Kill the driver with SIGKILL, and wait for the end of its work actors (about 2 s).

        Without the wait the last part of the old run could count as the first of the next one.
        """
        below = [
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if _is_work_actor(one)
        ]
        self.process.kill()
        self.process.wait()
        deadline_s = time.monotonic() + _END_S
        while alive := [one for one in below if _is_alive(one)]:
            if time.monotonic() > deadline_s:
                raise Sg4vError(f"{len(alive)} actors of a killed job still run after {_END_S:g} s")
            time.sleep(_POLL_S)

    def _pause(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_POLL_S)


@contextmanager
def killable_job(argv: Sequence[str], parts: Path, *, threads: int = 1) -> Iterator[KillableJob]:
    """Start a job as a process of its own; end it, if it still runs, when the block ends.

    Args:
        argv: its command line.
        parts: the folder of the attempt that the job writes.
        threads: its OMP_NUM_THREADS.
    """
    before = part_objects(parts)
    started_s = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=environment)
    job = KillableJob(process=process, parts=parts, started_s=started_s, _before=before)
    try:
        yield job
    finally:
        if process.poll() is None:
            job.kill()


def _is_work_actor(process: psutil.Process) -> bool:
    try:
        return _WORK_ACTOR in process.name()
    except psutil.NoSuchProcess:
        return False


def _is_alive(process: psutil.Process) -> bool:
    """Return False also for a zombie, which not every container's first process reaps."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def peak_rss_mb(pid: int) -> float:
    """Return the peak resident memory of a process in MB; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0]) / 1024 if peaks else 0.0
