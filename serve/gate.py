# SPDX-License-Identifier: Apache-2.0
"""How one ingress stops: what was accepted is answered, what comes later is refused."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from serve.protocol import ApiError

_RETRY_AFTER_S = 5


class Gate:
    """Counts the requests that are open, and closes."""

    def __init__(self) -> None:
        self._open = 0
        self._is_closed = False
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Hold the gate for one request.

        Raises:
            ApiError: 503, it is closed.
        """
        if self._is_closed:
            raise ApiError(
                503,
                "this server is stopping; try again, and you may reach another",
                code="stopping",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._open += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._is_empty.set()

    async def close(self) -> None:
        """Let nobody in from now on; return when the last request has ended.

        Serve deletes all deployments of an application at once: requests that wait in this
        ingress for a replica would then wait for ever.
        """
        self._is_closed = True
        await self._is_empty.wait()
