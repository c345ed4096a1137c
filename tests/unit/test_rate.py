# SPDX-License-Identifier: Apache-2.0
"""A limit a minute is spent evenly, nearly whole and never passed; who is told no waits."""

import bisect
import heapq
import random
from itertools import accumulate, pairwise

import pytest

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.rate import EvenLimit, Limits, Throttle

pytestmark = pytest.mark.teacher


def an_hour(limits: Limits, requests: int, seed: int = 0) -> list[tuple[float, int]]:
    """Send requests as fast as a throttle allows; return when each went out with its tokens.

    An answer takes 3 to 12 s and has far fewer tokens than were booked for it.
    """
    rng, throttle, now = random.Random(seed), Throttle(limits), 0.0
    on_their_way: list[tuple[float, int]] = []
    sent = []
    for _ in range(requests):
        used = 850 + min(1024, int(rng.lognormvariate(5.3, 0.4)))
        now = throttle.book(2000, now)
        while on_their_way and on_their_way[0][0] <= now:
            throttle.settle(2000, heapq.heappop(on_their_way)[1])
            throttle.answered()
        sent.append((now, used))
        heapq.heappush(on_their_way, (now + rng.uniform(3, 12), used))
    return sent


def minutes(sent: list[tuple[float, int]], *, tokens: bool) -> list[int]:
    """Return what every full minute had, sliding by a third of a second; the first is left out."""
    times = [at for at, _ in sent]
    sums = [0, *accumulate(used if tokens else 1 for _, used in sent)]
    found, start = [], 60.0
    while start + 60 < times[-1] - 20:
        first, last = bisect.bisect_left(times, start), bisect.bisect_right(times, start + 60)
        found.append(sums[last] - sums[first])
        start += 1 / 3
    return found


def test_every_minute_has_95_to_100_percent_of_the_requests_allowed() -> None:
    seen = minutes(an_hour(Limits(requests_per_min=600), 6000), tokens=False)
    assert min(seen) >= 570
    assert max(seen) <= 600


@pytest.mark.parametrize("seed", range(3))
def test_every_minute_has_95_to_100_percent_of_the_tokens_allowed(seed: int) -> None:
    limits = Limits(tokens_per_min=600_000, in_flight=400)
    seen = minutes(an_hour(limits, 6000, seed), tokens=True)
    assert min(seen) >= 570_000
    assert max(seen) <= 600_000


def test_requests_go_out_one_by_one_also_after_a_rest() -> None:
    limit = EvenLimit(600)
    early = [limit.book(1, 0.0) for _ in range(5)]
    late = [limit.book(1, 100.0) for _ in range(5)]
    for times in (early, late):
        gaps = [b - a for a, b in pairwise(times)]
        assert min(gaps) == pytest.approx(60 / (0.98 * 600))


def test_all_wait_as_long_as_the_provider_says_and_then_go_one_by_one() -> None:
    throttle = Throttle(Limits(requests_per_min=600))
    throttle.book(0, 0.0)
    throttle.turned_away(sent_s=0.0, now=1.0, retry_after_s=20.0)
    assert throttle.held(1.0) == 21.0
    times = [throttle.book(0, 1.0) for _ in range(3)]
    assert times[0] == 21.0
    assert times[2] > times[1] > times[0]


def test_without_a_word_from_the_provider_pauses_double_and_an_answer_ends_that() -> None:
    throttle = Throttle(Limits(in_flight=100))
    now, pauses = 0.0, []
    for _ in range(8):
        throttle.turned_away(sent_s=now, now=now, retry_after_s=None)
        pauses.append(throttle.held(now) - now)
        now = throttle.held(now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    throttle.answered()
    throttle.turned_away(sent_s=now, now=now, retry_after_s=None)
    assert throttle.held(now) - now == 1


def test_fewer_are_open_while_requests_are_turned_away_and_more_again_with_answers() -> None:
    throttle = Throttle(Limits(in_flight=100))
    for _ in range(50):  # all of one moment: the provider said no once
        throttle.turned_away(sent_s=0.0, now=0.5, retry_after_s=1.0)
    assert throttle.in_flight == 70
    for _ in range(5000):
        throttle.answered()
    assert throttle.in_flight == 100


@pytest.mark.parametrize("name", ["requests_per_min", "tokens_per_min", "in_flight"])
def test_a_limit_of_nothing_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: 0})
