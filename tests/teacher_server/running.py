# SPDX-License-Identifier: Apache-2.0
"""Start the provider from a test, and read its account."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.teacher_server.config import ServerConfig, save

_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A provider that answers."""

    url: str
    """Base URL for a client; ends in /v1."""
    log_path: Path
    process: subprocess.Popen[str]

    def entries(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the log so far, or its lines of one event."""
        whole_lines = self.log_path.read_bytes().rpartition(b"\n")[0].splitlines()
        entries = [json.loads(line) for line in whole_lines]
        return [entry for entry in entries if event in (None, entry["event"])]

    def billed_usd(self) -> float:
        """Return what the provider asks for, online and batch."""
        return float(sum(entry.get("usd", 0.0) for entry in self.entries()))

    def stop(self) -> None:
        """End the process; again does nothing."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(config: ServerConfig, log_path: Path, *, port: int = 0) -> Iterator[Running]:
    """Run a provider while the context is open; it also ends with the process that opened it.

    The log is appended to, so a provider that is started again goes on with its account. It
    forgets files, batches and tries.
    """
    config_path = log_path.with_suffix(".config.json")
    save(config, config_path)
    log_path.touch()
    flags = ["--config", str(config_path), "--log", str(log_path), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.teacher_server.server", *flags, "--with-parent"],
        cwd=_REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        running = Running(url=_first_line(process), log_path=log_path, process=process)
        try:
            yield running
        finally:
            running.stop()


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"the provider ended with {process.wait()} before it listened")
    return line
