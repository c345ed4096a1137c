# SPDX-License-Identifier: Apache-2.0
"""The teacher's key is nowhere but in the environment: not in logs, artifacts or error texts."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.teacher_server.config import Always, ServerConfig
from tests.teacher_server.running import serving
from tests.with_ray.collect_site import KEY_VARIABLE, make_collect_site

pytestmark = [pytest.mark.teacher, pytest.mark.timeout(600)]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs: a short path, since sockets are below it."""
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def files_with(text: str, *folders: Path) -> list[Path]:
    """Return the files below some folders that contain a text; Parquet is read, not searched."""
    found = []
    for folder in folders:
        for file in folder.rglob("*"):
            if file.suffix == ".parquet":
                data = str(pq.read_table(file).to_pylist()).encode()
            else:
                data = file.read_bytes() if file.is_file() else b""
            if text.encode() in data:
                found.append(file)
    return found


@pytest.mark.parametrize(
    "outcome", ["401", *(pytest.param(one, marks=pytest.mark.soak) for one in ("400", "500"))]
)
def test_a_failing_job_tells_the_key_to_nobody(
    tmp_path: Path, ray_folder: Path, outcome: str
) -> None:
    key = f"sk-{secrets.token_hex(20)}"
    always = (Always(outcome=outcome),)
    # The worst provider: it repeats the key that it was given.
    config = ServerConfig(key=key, always=always, echo_key=True)
    (tmp_path / "provider").mkdir()
    with serving(config, tmp_path / "provider" / "log.jsonl") as provider:
        site = make_collect_site(tmp_path, provider, 40)
        driver = site.drive(
            "--endpoint.max-tries=2",
            environment={KEY_VARIABLE: key, "RAY_TMPDIR": str(ray_folder)},
        )
        assert driver.wait() == 1
    assert len(list(ray_folder.rglob("*.log"))) > 3, "Ray's logs are looked through"
    everything = (tmp_path / "root", tmp_path / "logs", ray_folder)
    assert files_with("[API key]", *everything), "the provider said it, and we did not repeat it"
    assert not files_with(key, *everything)
