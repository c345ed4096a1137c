# SPDX-License-Identifier: Apache-2.0
"""A proxy in front of an S3: it reports each request before and after the store has answered.

The process behind a connection is found from its port, so that drivers and workers need no shim.
"""

import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.crashes.events import Controller

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class S3Proxy(ThreadingHTTPServer):
    """Forwards requests to a store of this machine."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, store: tuple[str, int], controller: Controller) -> None:
        """Start to serve; `store` is the host and port of the S3."""
        self.store, self.controller = store, controller
        # The store compares and writes in two steps, so its conditional writes go one at a time.
        self.writing = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, name="s3-proxy", daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed in the middle of their requests."""


class _Handler(BaseHTTPRequestHandler):
    server: S3Proxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self._store = http.client.HTTPConnection(*self.server.store)
        self._pid = 0

    def finish(self) -> None:
        self._store.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are traced by the controller."""

    def _forward(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            self.close_connection = True  # the client was killed while it sent
            return
        operation, path = _named(self.command, self.path, "if-none-match" in self.headers)
        controller = self.server.controller
        ports = self.client_address[1], self.server.server_address[1]
        self._pid = self._pid or _pid_behind(*ports, controller.processes())
        report = controller.report
        report(path, self._pid, operation, "before")
        with self.server.writing:
            self._store.request(self.command, self.path, body, dict(self.headers.items()))
            answer = self._store.getresponse()
            data = answer.read()
        if report(path, self._pid, operation, "after"):
            self._cut()
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.getheader("content-length") if self.command == "HEAD" else str(len(data))
        self.send_header("content-length", length or "0")
        self.end_headers()
        self.wfile.write(data)

    def _cut(self) -> None:
        """Reset the connection instead of an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward


def _named(command: str, target: str, is_conditional: bool) -> tuple[str, str]:
    """Return the operation of a request and the path of its object below the bucket."""
    url = urlsplit(target)
    _, _, path = unquote(url.path).lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True)
    if "list-type" in query:
        return "list", query.get("prefix", [""])[0].rstrip("/")
    if command == "PUT":
        return ("create" if is_conditional else "put"), path
    return {"GET": "get", "HEAD": "head"}.get(command, command.lower()), path


def _pid_behind(client_port: int, proxy_port: int, pids: Iterable[int]) -> int:
    """Return the process that holds the client's end of a connection; 0 if it is gone.

    Connections to other servers, closed ones among them, may have the same client port.
    """
    inode = ""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if (_port(fields[1]), _port(fields[2])) == (client_port, proxy_port):
            inode = fields[9]
            break
    return next((pid for pid in pids if f"socket:[{inode}]" in _open_files(pid)), 0)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _open_files(pid: int) -> set[str]:
    folder, found = f"/proc/{pid}/fd", set()
    try:
        for handle in os.listdir(folder):
            with suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(f"{folder}/{handle}"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
    return found
