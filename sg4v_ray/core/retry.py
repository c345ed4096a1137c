# SPDX-License-Identifier: Apache-2.0
"""Retry on error types, with full jitter; anything else propagates at once."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from sg4v_ray.core.errors import ConfigError

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often and how long to try again."""

    max_tries: int = 6
    """Calls in all, the first one included."""
    first_delay_s: float = 0.5
    """Upper bound of the first pause; it doubles each time."""
    max_delay_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_tries < 1:
            raise ConfigError(f"max_tries must be at least 1, got {self.max_tries}")

    def bound_s(self, failures: int) -> float:
        """Return the longest pause in seconds after so many failures (1 or more)."""
        return float(min(self.max_delay_s, self.first_delay_s * 2 ** (failures - 1)))


async def retrying(
    call: Callable[[], Awaitable[T]],
    *,
    on: tuple[type[Exception], ...],
    policy: RetryPolicy,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """Await `call()` until it succeeds, at most `policy.max_tries` times.

    Source:
        Full jitter (uniform between 0 and the bound), AWS Architecture Blog, "Exponential
        Backoff And Jitter", 2015: many clients that failed together do not return together.
    """
    for failures in range(1, policy.max_tries):
        try:
            return await call()
        except on as error:
            _log.info("try %d of %d failed: %s", failures, policy.max_tries, error)
            await sleep(random.uniform(0, policy.bound_s(failures)))
    return await call()
