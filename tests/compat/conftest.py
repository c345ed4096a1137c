# SPDX-License-Identifier: Apache-2.0
"""A live server: `python -m serve` with the captioner of this package, on Ray Serve, with keys."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import pytest

from serve.keys import new_key
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes import embedded
from tests.waiting import free_port

REPOSITORY = Path(__file__).parents[2]
REPORT = REPOSITORY / "runs/compat/report.json"
MODEL = "captioner"
CONFIG = """
host: 127.0.0.1
port: {port}
auth: {{keys_file: {keys}}}
limits: {{timeout_s: 60}}
ingress_cpus: 0.5
models:
  - id: {model}
    artifact: {{name: {ref.name}, version: {ref.version}}}
    template: vicuna_v1
    geometry: pad
    instruction: Analyze the image in a comprehensive and detailed manner.
    engine: {{kind: hf, dtype: float32, capacity: 8, max_model_len: 512}}
    generation: {{max_tokens: 64}}
    max_ongoing: 16
    max_queued: 32
    num_cpus: 0.75
"""


@dataclass(frozen=True)
class Server:
    """Where the server listens, and a key that it takes."""

    url: str
    key: str


@dataclass(frozen=True)
class Row:
    """What one client did."""

    program: str
    client: str
    """Its name and version, as it says them itself."""
    works: list[str]
    passed: bool


_ROWS = pytest.StashKey[list[Row]]()


def _wait_until_ready(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline, pause = time.monotonic() + 240, threading.Event()
    with httpx.Client(headers={"authorization": f"Bearer {server.key}"}, trust_env=False) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(f"{server.url}/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            pause.wait(0.5)
    pytest.fail(f"the server is not ready:\n{log.read_text()[-5000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("compat"), free_port()
    ref = embedded.install_captioner(Storage(str(folder / "root")))
    secret, key = new_key("clients")
    keys, config, log = folder / "keys.yaml", folder / "serve.yaml", folder / "log"
    keys.write_text(
        f"keys:\n  - {{name: {key.name}, sha256: '{key.sha256}', scopes: [inference, metrics]}}\n"
    )
    config.write_text(CONFIG.format(port=port, keys=keys, model=MODEL, ref=ref))
    made = Server(f"http://127.0.0.1:{port}", secret)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", f"config={config}", f"root={folder / 'root'}"],
            cwd=REPOSITORY,
            env=os.environ | {"RAY_ADDRESS": "local"},  # never a cluster that happens to run here
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(made, process, log)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(timeout=120)
        finally:
            process.kill()  # does nothing to one that has ended


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """Where each client's result goes; the table at the end is made of it."""
    return request.config.stash.setdefault(_ROWS, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print a line for each client, and write the same as a file."""
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n")
    terminalreporter.write_sep("-", f"clients; also in {REPORT.relative_to(REPOSITORY)}")
    for one in rows:
        result = "passed" if one.passed else "FAILED"
        terminalreporter.write_line(
            f"{one.program:24}{one.client:34}{result}  {', '.join(one.works)}"
        )
