# SPDX-License-Identifier: Apache-2.0
"""Waiting for what happens in other processes, and ports for them."""

import socket
import threading
import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool], *, within_s: float = 10.0) -> float:
    """Wait for a condition, asking anew each time; return the seconds that it took.

    A condition that never holds fails.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, f"not so after {within_s:g} s"
        threading.Event().wait(0.02)
    return time.monotonic() - began


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
