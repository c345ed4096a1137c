# SPDX-License-Identifier: Apache-2.0
"""A captioning job to be killed: drawn images, a fake engine, drivers as real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sg4v_ray.core.artifact import Ref, begin, commit, find
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.row_files import read_table
from sg4v_ray.core.rows import ROWS, put_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes.easy_vqa import CAPTIONS, TEST_IMAGES
from sg4v_ray.sources import shapes

T = TypeVar("T")

CAPTIONER = Ref(name="fake-captioner")
ROWS_PER_PART = 20
FLAGS = (
    "demo",
    f"--captioner.name={CAPTIONER.name}",
    "--engine.kind=fake",
    "--engine.latency-s=0.02",  # a caption takes about a second: time to be killed
    "--engine.capacity=16",
    "--engine.max-model-len=512",
    f"--batching.rows-per-part={ROWS_PER_PART}",
    "--batching.rows-per-task=8",
    "--config.quality.min-words=1",
    "--where.no-progress",
)
CAPTION = ("-m", "jobs.caption_images")
KILLED_AT_COMMIT = (
    "-c",
    "import os, signal, sys\n"
    "import jobs.caption_images as job\n"
    "from sg4v_ray.exactly_once import stage\n"
    "stage.commit = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
    "job.run()\n",
)
REPOSITORY = Path(__file__).parents[2]


class Driver:
    """A job as a process of its own; what it writes to stderr goes to a file."""

    def __init__(self, argv: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        # A shell starts background jobs deaf to Ctrl-C, and their children inherit that.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                argv, cwd=REPOSITORY, env=os.environ | environment, stderr=stderr
            )

    @property
    def errors(self) -> str:
        """What it wrote so far."""
        return self._log.read_text()

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        return self._process.wait(timeout=400)

    def kill(self) -> None:
        """End it as the kernel does when memory is short."""
        self._process.kill()
        self._process.wait()

    def interrupt(self) -> int:
        """End it as Ctrl-C does and return its exit code."""
        self._process.send_signal(signal.SIGINT)
        return self.wait()

    def succeed(self) -> None:
        """Wait for its end; it must have succeeded."""
        assert self.wait() == 0, self.errors[-3000:]

    def until(self, condition: Callable[[], T], *, every_s: float = 0.05) -> T:
        """Wait for something that it brings about while it lives, and return it."""
        deadline = time.monotonic() + 240
        pause = threading.Event()
        while not (found := condition()):
            assert self._process.poll() is None, f"it ended early: {self.errors[-3000:]}"
            assert time.monotonic() < deadline, f"nothing in 240 s: {self.errors[-3000:]}"
            pause.wait(every_s)
        return found

    def below(self, title: str) -> list[int]:
        """Return the processes below it whose command line contains a title."""
        return list(processes(title, self._process.pid))


@dataclass(frozen=True)
class Site:
    """A root with an index and a captioner, and what its drivers are told."""

    storage: Storage
    num_images: int
    logs: Path
    environment: dict[str, str] = field(default_factory=dict)

    def drive(self, *command: str, flags: tuple[str, ...] = ()) -> Driver:
        """Start the captioning job as its users do."""
        root = f"--where.root={self.storage.root}"
        argv = [sys.executable, *(command or CAPTION), *FLAGS, root, *flags]
        return Driver(argv, self.logs / f"{time.monotonic_ns()}.log", self.environment)

    def captioned(self) -> list[str]:
        """Return the ids of all rows that the manifest lists."""
        artifact_dir, ids = self.storage.sub(CAPTIONS.path), []
        for file in find(self.storage, CAPTIONS).files:
            ids += read_table(artifact_dir, file.path, ["id"])["id"].to_pylist()
        return ids

    def committed(self) -> int:
        """Count the rows of committed parts."""
        parts = self.storage.sub(f"{CAPTIONS.path}/{ROWS}/attempt-0001").list()
        return ROWS_PER_PART * sum(1 for path in parts if path.endswith(".parquet"))

    def check_exactly_once(self) -> None:
        """Assert that every id of the index is in the output once, and the manifest says so."""
        counts = Counter(self.captioned())
        assert len(counts) == self.num_images
        assert set(counts.values()) == {1}
        assert find(self.storage, CAPTIONS).counts["rows"] == self.num_images


def make_site(
    root: str, pictures: Path, model: Path, num_images: int, *, gone: int = 0, **environment: str
) -> Site:
    """Write an index over one drawn picture, `gone` rows over none, and a fake's captioner."""
    storage = Storage(root)
    picture = pictures / "picture.png"
    shapes.draw(1).save(picture)
    rows = [
        ImageRow(
            id=f"i{n:04d}",
            source="drawn",
            uri=str(picture if n >= gone else pictures / "gone.png"),
            size_bytes=1,
        )
        for n in range(num_images)
    ]
    write_index(storage, rows)
    finish(storage, CAPTIONER, digests=storage.upload(model, f"{CAPTIONER.path}/model"))
    return Site(storage, num_images, pictures, environment)


def write_index(storage: Storage, rows: list[ImageRow]) -> None:
    """Write some rows as the demo's index."""
    file = put_rows(storage.sub(TEST_IMAGES.path), f"{ROWS}/part-0.parquet", ImageRow, rows)
    finish(storage, TEST_IMAGES, attempts=(ROWS,), files=(file,))


def finish(storage: Storage, ref: Ref, **fields: Any) -> None:
    """Commit an artifact whose files are there."""
    with hold(begin(storage, ref, {})) as lease:
        commit(storage, ref, config={}, inputs={}, counts={}, lease=lease, **fields)


def processes(title: str, below: int) -> Iterator[int]:
    """Yield the processes below a process whose command line contains a title."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and title in _command_line(int(entry.name)):
            ancestor = int(entry.name)
            while ancestor > 1 and ancestor != below:
                ancestor = _parent(ancestor)
            if ancestor == below:
                yield int(entry.name)


def kill(pids: list[int]) -> None:
    """Kill processes as the kernel does when memory is short."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
