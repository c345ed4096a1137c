# SPDX-License-Identifier: Apache-2.0
"""The one HTTP fetcher: hosts on a list, public addresses only, bytes and seconds capped.

A URL in a data set is written by a stranger and is opened from inside a cluster. So a host must
be allowed; its name is resolved once, every address is checked, and the connection goes to the
checked address (a second lookup could give another answer); each redirect is checked the same.
"""

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import httpcore
import httpx

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.images import Rejected
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.retry import RetryPolicy, retrying

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_GONE: Final = frozenset({404, 410})
_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_PUBLIC_V6: Final = ipaddress.ip_network("2000::/3")
_SPECIAL_V4: Final = ipaddress.ip_network("192.0.0.0/24")
"""IANA's special purposes; in it lies the metadata service of one cloud. Python 3.11 has it global
but for its first eight addresses."""
_TUNNELS_V6: Final = (ipaddress.ip_network("2001::/32"), ipaddress.ip_network("2002::/16"))


_HOST: Final = re.compile(r"\.?[^\s/:@?#*%\\.][^\s/:@?#*%\\]*(?<!\.)")


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """What may be fetched over HTTP, and how patiently."""

    allow_hosts: tuple[str, ...] = ()
    """Host names; `.example.org` also allows every host below it, `*` every public host. None are
    allowed by default, so a URL in an index is a decision of yours."""
    allow_private_hosts: tuple[str, ...] = ()
    """Host names that may resolve to private addresses: mirrors inside your own network."""
    allow_ports: tuple[int, ...] = ()
    """Ports that may be asked; none named allows any."""
    timeout_s: float = 30.0
    """For one image, redirects included, retries not."""
    max_redirects: int = 5
    concurrency: int = 16
    """Images that one CPU worker fetches at once."""
    retry: RetryPolicy = RetryPolicy(max_tries=3, max_delay_s=10.0)

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s must be above 0, got {self.timeout_s}")
        if self.max_redirects < 0:
            raise ConfigError(f"max_redirects must be at least 0, got {self.max_redirects}")
        if self.concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {self.concurrency}")
        for host in (*self.allow_hosts, *self.allow_private_hosts):
            if host != "*" and not (_HOST.fullmatch(host) and _ascii(host)):
                raise ConfigError(
                    "allow_hosts takes host names such as images.example.org, or .example.org for "
                    f"every host below it, got {host!r}"
                )


@dataclass(kw_only=True, slots=True)
class ByteBudget:
    """Bytes that several fetches may read together."""

    left: int

    def take(self, size: int) -> bool:
        """Take so many; False if there are no more."""
        self.left -= size
        return self.left >= 0


class _Refused(Exception):
    """This URL will never be fetched under this config."""

    def __init__(self, reason: Reject, detail: str) -> None:
        super().__init__(detail)
        self.rejected = Rejected(reason, detail)


class _Busy(Exception):
    """The server may answer another time."""


class Fetcher:
    """Fetches images over HTTP(S). Bound to the event loop that first uses it."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=4 * config.concurrency,
            keepalive_expiry=30.0,
            network_backend=_CheckedAddresses(config),
        )

    async def get(
        self, url: str, *, max_bytes: int, budget: ByteBudget | None = None
    ) -> bytes | Rejected:
        """Return the body of a URL, or why there is none. Never raises for what a server does.

        Args:
            url: where to look.
            max_bytes: of this body.
            budget: of all bodies that are fetched with it; what is read twice counts twice.
        """

        async def once() -> bytes:
            async with asyncio.timeout(self._config.timeout_s):
                return await self._follow(url, max_bytes, budget)

        try:
            return await retrying(
                once,
                on=(_Busy, TimeoutError, httpcore.NetworkError, httpcore.TimeoutException),
                policy=self._config.retry,
            )
        except _Refused as error:
            return error.rejected
        except (TimeoutError, httpcore.TimeoutException):
            detail = f"no whole answer within {self._config.timeout_s:g} s from {url}"
            return Rejected(Reject.TIMED_OUT, detail)
        except (
            _Busy,
            httpcore.NetworkError,
            httpcore.ProtocolError,
            socket.gaierror,
            ValueError,  # a port above 65535, a host that nobody can be asked for (a..b.org)
        ) as error:
            return Rejected(Reject.HTTP_ERROR, f"{error or type(error).__name__} from {url}")

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    async def _follow(self, url: str, max_bytes: int, budget: ByteBudget | None) -> bytes:
        here = self._checked(url)
        for _ in range(self._config.max_redirects + 1):
            body, target = await self._one(here, max_bytes, budget)
            if target is None:
                return body
            here = self._checked(target, here)
        raise _Refused(Reject.HTTP_ERROR, f"more than {self._config.max_redirects} redirects")

    def _checked(self, url: str, base: httpx.URL | None = None) -> httpx.URL:
        """Return a URL, relative ones joined to `base`, if its host is allowed."""
        try:
            found = base.join(url) if base else httpx.URL(url)
        except httpx.InvalidURL as error:
            raise _Refused(Reject.HOST_NOT_ALLOWED, f"no URL ({error}): {url}") from error
        if found.scheme not in ("http", "https") or not found.host:
            raise _Refused(Reject.HOST_NOT_ALLOWED, f"not an http(s) URL: {found}")
        if found.userinfo or "\\" in url:  # read by others as another host than by us
            raise _Refused(Reject.HOST_NOT_ALLOWED, "a URL with a user or a backslash in it")
        port = {"http": 80, "https": 443}[found.scheme] if found.port is None else found.port
        if not 0 < port < 65_536:
            raise _Refused(Reject.HTTP_ERROR, f"no host has a port {port}: {found}")
        if self._config.allow_ports and port not in self._config.allow_ports:
            raise _Refused(Reject.HOST_NOT_ALLOWED, f"port {port} is not in allow_ports")
        allowed = (*self._config.allow_hosts, *self._config.allow_private_hosts)
        if not _on_list(found.raw_host.decode("ascii"), allowed):
            detail = f"{found.host} is not in allow_hosts; add it, or '*' for every public host"
            raise _Refused(Reject.HOST_NOT_ALLOWED, detail)
        return found

    async def _one(
        self, url: httpx.URL, max_bytes: int, budget: ByteBudget | None
    ) -> tuple[bytes, str | None]:
        """Return a body, or where a redirect leads."""
        # Its parts, not its text: that would be parsed again, by another parser than was checked.
        place = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "sg4v-ray"),
        ]
        async with self._pool.stream("GET", place, headers=headers) as answer:
            given = {key.lower(): value.decode("latin-1") for key, value in answer.headers}
            if answer.status in _REDIRECTS and b"location" in given:
                return b"", given[b"location"]
            if answer.status in _GONE:
                raise _Refused(Reject.MISSING, f"HTTP {answer.status}: {url}")
            if answer.status in _BUSY:
                raise _Busy(f"HTTP {answer.status}")
            if answer.status != 200:
                raise _Refused(Reject.HTTP_ERROR, f"HTTP {answer.status}: {url}")
            told = given.get(b"content-length", "0")
            if told.isdigit() and int(told) > max_bytes:
                raise _Refused(Reject.TOO_MANY_BYTES, f"{told} bytes, limit {max_bytes}")
            body = bytearray()
            async for chunk in answer.aiter_stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _Refused(Reject.TOO_MANY_BYTES, f"over {max_bytes} bytes, the limit")
                if budget is not None and not budget.take(len(chunk)):
                    raise _Refused(Reject.TOO_MANY_BYTES, "too many bytes with those beside it")
            return bytes(body), None


class _CheckedAddresses(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that were checked. TLS still verifies the host name."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve once, check every address, connect to the first."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(one[4][0]) for one in found]
        if not _on_list(host, self._config.allow_private_hosts):
            for address in addresses:
                if not is_public(address):
                    raise _Refused(
                        Reject.HOST_NOT_ALLOWED,
                        f"{host} resolves to {address}, which is not public; a mirror of your own "
                        "network belongs in allow_private_hosts",
                    )
        return await self._inner.connect_tcp(
            addresses[0],
            port,
            timeout=timeout,
            local_address=local_address,
            socket_options=socket_options,
        )

    async def sleep(self, seconds: float) -> None:
        """Sleep; part of the interface."""
        await self._inner.sleep(seconds)


def is_public(address: str) -> bool:
    """Say whether an IP address belongs to the public internet.

    IPv6 forms that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) are not: behind them may
    be any private host.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip not in _PUBLIC_V6 or any(ip in one for one in _TUNNELS_V6)
    ):
        return False
    return ip.is_global and not ip.is_multicast and ip not in _SPECIAL_V4


def _on_list(host: str, allowed: tuple[str, ...]) -> bool:
    host = host.lower().rstrip(".")
    return any(
        one == "*" or host == name or (name.startswith(".") and host.endswith(name))
        for one in allowed
        if (name := _ascii(one))
    )


@functools.cache
def _ascii(host: str) -> str:
    """Return a configured host name as URLs have it: lower case, other alphabets as xn--...

    Empty if there is no such name.
    """
    if host.isascii():
        return host.lower()
    dot = "." if host.startswith(".") else ""
    try:
        return dot + httpx.URL(f"http://{host.removeprefix('.')}/").raw_host.decode("ascii")
    except httpx.InvalidURL:
        return ""
