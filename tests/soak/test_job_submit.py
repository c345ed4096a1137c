# SPDX-License-Identifier: Apache-2.0
"""`ray job submit` on a token-protected cluster gives what a local run gives."""

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes.easy_vqa import CAPTIONS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

REPO = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A head node of this machine behind a token; yields the environment of its users."""
    dashboard = free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # Blocking, because `ray stop` would stop every other cluster of this machine too.
    start = [RAY, "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=2"]
    start += [f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    head = subprocess.Popen(start, env=environment)
    pause = threading.Event()
    while subprocess.run([RAY, "job", "list"], env=environment, capture_output=True).returncode:
        assert head.poll() is None, "the head node did not start"
        pause.wait(1)
    yield environment
    head.terminate()
    head.wait(60)


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    argv = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", *command]
    return subprocess.run(
        argv, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def run_locally(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], cwd=REPO, check=True, timeout=600)


def captions(root: Path) -> dict[str, str | None]:
    return {one.id: one.text for one in read_rows(Storage(str(root)), CAPTIONS, CaptionRow)}


def test_without_the_token_nothing_is_accepted(cluster: dict[str, str]) -> None:
    stranger = {**cluster, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    assert submit(stranger, "jobs").returncode != 0


def test_a_submitted_job_equals_a_local_one(cluster: dict[str, str], tmp_path: Path) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    for job in ("jobs.index_images", "jobs.caption_images"):
        done = submit(cluster, job, "demo", "--where.root", str(remote))
        assert done.returncode == 0, done.stdout + done.stderr
        run_locally(job, "demo", "--where.root", str(local))
    assert len(captions(remote)) == 1000
    assert captions(remote) == captions(local)


def test_a_relative_root_is_refused_with_what_to_write(cluster: dict[str, str]) -> None:
    done = submit(cluster, "jobs.caption_images", "demo", "--where.root", "runs/demo")
    assert done.returncode != 0
    assert "write --where.root $PWD/runs/demo" in done.stdout + done.stderr
