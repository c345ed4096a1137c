# SPDX-License-Identifier: Apache-2.0
"""A parallel map in order that holds a bounded number of results."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int, ahead: int
) -> Generator[_Result, None, None]:
    """Yield `function(item)` of each item, in the order of the items.

    Args:
        threads: calls at once.
        ahead: items taken from `items` whose result was not yielded, at most.

    Raises:
        Any error of a call, in the place of its result.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="map-ahead") as pool:
        calls: deque[Future[_Result]] = deque()
        try:
            calls.extend(pool.submit(function, one) for one in islice(waiting, ahead))
            while calls:
                result = calls.popleft().result()
                calls.extend(pool.submit(function, one) for one in islice(waiting, 1))
                yield result
        finally:
            for call in calls:
                call.cancel()
