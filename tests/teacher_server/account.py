# SPDX-License-Identifier: Apache-2.0
"""The provider's own account: one JSON line per event, in the file before the client knows."""

import json
import os
import time
from pathlib import Path
from typing import Any

from tests.teacher_server.config import ServerConfig


class Account:
    """Appends to the log; a second server on the same file goes on counting."""

    def __init__(self, config: ServerConfig, log: Path) -> None:
        self._config = config
        self._file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        self._num_requests = log.read_bytes().count(b'{"event":"request"')

    def number(self) -> int:
        """Return the number of the next request, from 1."""
        self._num_requests += 1
        return self._num_requests

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return what an answer costs online."""
        config = self._config
        paid = (
            prompt_tokens * config.usd_per_million_input
            + completion_tokens * config.usd_per_million_output
        )
        return round(paid / 1e6, 12)

    def write(self, event: str, **fields: Any) -> None:
        """Append one line; the kernel has it when this returns, so a SIGKILL loses nothing."""
        line = {"event": event, "at": time.time(), **fields}
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")
