# SPDX-License-Identifier: Apache-2.0
"""Requests and tokens per minute over a sliding window, and requests at one time."""

import math
from collections import deque

from tests.teacher_server.config import ServerConfig


class Limits:
    """Lets requests in or says how long to wait; a request that is kept out counts nothing."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._let_in: deque[tuple[float, int]] = deque()
        self._tokens = 0
        self.concurrent = 0

    def enter(self, tokens: int, now: float) -> int | None:
        """Count a request, or return the whole seconds after which there is room for it."""
        config = self._config
        while self._let_in and self._let_in[0][0] <= now - config.window_s:
            self._tokens -= self._let_in.popleft()[1]
        if config.max_concurrent is not None and self.concurrent >= config.max_concurrent:
            return 1
        if config.requests_per_window is None and config.tokens_per_window is None:
            return None
        if (wait_s := self._wait_s(tokens, now)) > 0:
            return math.ceil(wait_s)
        self._let_in.append((now, tokens))
        self._tokens += tokens
        return None

    def _wait_s(self, tokens: int, now: float) -> float:
        """Return when enough of the oldest requests have left the window."""
        most_requests = self._config.requests_per_window or math.inf
        most_tokens = self._config.tokens_per_window or math.inf
        requests, used, wait_s = len(self._let_in), self._tokens, 0.0
        for at, size in self._let_in:
            if requests < most_requests and used + tokens <= most_tokens:
                return wait_s
            requests, used, wait_s = requests - 1, used - size, at + self._config.window_s - now
        fits = requests < most_requests and used + tokens <= most_tokens
        return wait_s if fits else self._config.window_s
