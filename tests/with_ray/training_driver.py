# SPDX-License-Identifier: Apache-2.0
"""A training driver as a process of its own, as `python -m jobs...` is one, and what it does."""

import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from sg4v_ray.core.storage import Storage
from sg4v_ray.training import checkpoint

_DRIVER = """
import pickle, sys
from pathlib import Path
import ray
from jobs._cli import main
from sg4v_ray.training import launch

def run():
    ray.init(address=sys.argv[1], log_to_driver=False)
    launch.run(**pickle.loads(Path(sys.argv[2]).read_bytes()))

launch._RESIZE_EVERY_S = float(sys.argv[3])
main(run)
"""


def start_driver(
    job: dict[str, Any], folder: Path, *, address: str = "", resize_every_s: float = 60.0
) -> "subprocess.Popen[bytes]":
    """Start `launch.run(**job)`.

    Args:
        job: the arguments.
        folder: gets the file `said` with what the driver prints of errors.
        address: of a Ray cluster; that of this process by default.
    """
    (folder / "job").write_bytes(pickle.dumps(job))
    address = address or ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", _DRIVER, address, str(folder / "job"), str(resize_every_s)]
    with (folder / "said").open("w") as said:
        return subprocess.Popen(command, stderr=said)


def newest_step(home: Storage) -> int:
    """Return the step of the newest complete checkpoint."""
    found = checkpoint.newest(home)
    return 0 if found is None else found.progress.step


def wait_for(what: Callable[[], bool], *, still: Callable[[], bool]) -> None:
    """Wait until something is so; fail when what must make it so has ended."""
    pause = threading.Event()
    while not what():
        assert still(), "the run ended before the test could interfere"
        pause.wait(0.02)


def training_workers() -> list[psutil.Process]:
    """Return the training processes of this test's own Ray cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::RayTrainWorker" in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found
