# SPDX-License-Identifier: Apache-2.0
"""The choice of crash points from the requests of an undisturbed run: seeded, all kinds covered."""

import random
from collections import Counter
from collections.abc import Iterable

from tests.crashes.events import Moment, Point

_WRITES = ("put", "create")
_SHARES = {"connection": 0.13, "actor": 0.19, "driver": 0.34, "all": 0.34}
"""Of all points, both stores together. An actor makes few kinds of requests, so these repeat."""
_BY_CLOCK = ("beats", "status.json", "curves", "captions/lease")
"""Objects whose requests depend on the time that a run takes: only the first is sure to come."""


def choose(traces: dict[str, list[Moment]], num_points: int, seed: int) -> list[Point]:
    """Return crash points in a random order.

    First every phase of every kind of write, then one phase of every kind of read, then others;
    as many for each store and victim as their shares say.

    Args:
        traces: the moments of an undisturbed run by store.
    """
    rng = random.Random(seed)
    points: list[Point] = []
    seen: Counter[object] = Counter()
    quotas: list[tuple[str, str, int]] = []
    for victim, share in _SHARES.items():
        count = round(num_points * share)
        # Only the proxy of the S3 can accept a request and lose its answer.
        num_local = 0 if victim == "connection" else -(-count // 2)
        quotas += [("local", victim, num_local), ("s3", victim, count - num_local)]
    for store, victim, count in quotas:
        pool = sorted(_moments_for(victim, traces[store]))
        rng.shuffle(pool)
        for _ in range(count):
            best = min(pool, key=lambda moment: _rank(moment, store, seen), default=None)
            if best is None:
                break
            pool.remove(best)
            for key in _groups(best, store):
                seen[key] += 1
            points.append(Point(store, victim, best))
    rng.shuffle(points)
    return points


def _moments_for(victim: str, trace: list[Moment]) -> set[Moment]:
    if victim == "connection":
        found: Iterable[Moment] = (one for one in trace if one.phase == "after")
    elif victim == "actor":
        found = (one for one in trace if one.request.role in ("actor", "decode"))
    else:
        found = trace
    return {
        one
        for one in found
        # A request of an unknown process cannot be found again in another run.
        if one.request.role != "other"
        and (one.number == 1 or not any(name in one.request.kind for name in _BY_CLOCK))
    }


def _groups(moment: Moment, store: str) -> list[object]:
    request = moment.request
    if request.operation in _WRITES:
        return [(store, request, moment.phase), (store, request)]
    # The end of a read and the start of the next request are one state of the store.
    return [request, (store, request)]


def _rank(moment: Moment, store: str, seen: Counter[object]) -> tuple[int, int, int]:
    first, second = _groups(moment, store)
    is_read = moment.request.operation not in _WRITES
    return seen[first], int(is_read), seen[second]
