# SPDX-License-Identifier: Apache-2.0
"""`ray job submit` on a token-protected cluster gives what a local run gives."""

import json
import os
import secrets
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes.easy_vqa import CAPTIONS
from tests.teacher_server.config import Always, ServerConfig
from tests.teacher_server.running import serving
from tests.waiting import free_port
from tests.with_ray.collect_site import FLAGS, KEY_VARIABLE, make_collect_site

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

REPO = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with head_node({}) as environment:
        yield environment


@contextmanager
def head_node(secret: dict[str, str]) -> Iterator[dict[str, str]]:
    """A head node of this machine behind a token; yields the environment of its users.

    Args:
        secret: variables of the node that its users do not have.
    """
    dashboard = str(free_port())
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
    head = subprocess.Popen(start, env=environment | secret)
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


@pytest.mark.teacher
def test_a_submitted_collection_shows_the_teachers_key_nowhere(tmp_path: Path) -> None:
    """Neither the job's metadata, nor its logs, nor the metrics of the cluster have it."""
    key = f"sk-{secrets.token_hex(20)}"
    config = ServerConfig(key=key, always=(Always(outcome="401"),), echo_key=True)
    (tmp_path / "provider").mkdir()
    with (
        serving(config, tmp_path / "provider" / "log.jsonl") as provider,
        head_node({KEY_VARIABLE: key}) as environment,
    ):
        site = make_collect_site(tmp_path, provider, 8)
        root = ("--where.root", site.storage.root, "--endpoint.base-url", provider.url)
        done = submit(environment, "jobs.collect_captions", *FLAGS, *root)
        listed = subprocess.run(
            [RAY, "job", "list"], env=environment, capture_output=True, text=True, check=True
        )
        metrics = all_metrics(environment)
    told = done.stdout + done.stderr + listed.stdout + listed.stderr + metrics
    assert done.returncode != 0
    assert "[API key]" in told, "the provider said it, and we did not repeat it"
    assert "collect_captions" in listed.stdout
    assert "ray_" in metrics
    assert key not in told


def all_metrics(environment: dict[str, str]) -> str:
    """Return what Prometheus reads of each process group of a cluster."""
    token = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    address = environment["RAY_API_SERVER_ADDRESS"]
    places = json.loads(_read(f"{address}/api/prometheus/sd", token))
    targets = [target for one in places for target in one["targets"]]
    return "".join(_read(f"http://{target}/metrics", token) for target in targets)


def _read(url: str, headers: dict[str, str]) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return str(answer.read().decode())
