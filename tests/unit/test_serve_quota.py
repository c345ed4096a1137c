# SPDX-License-Identifier: Apache-2.0
"""A key gets what its quota says and not more, and is told how long to wait."""

import itertools
import random
from typing import Any

import pytest

from serve.keys import Quota
from serve.quota import Quotas, Refusal, Ticket

NOON = 20_000 * 86_400 + 43_200.0


NUMBERS = itertools.count(100)
ONE = 1


def books() -> Quotas:
    return Quotas(longest_request_s=100.0)


def enter(
    quotas: Quotas, name: str, quota: Quota, number: int | None = None, **when: Any
) -> Ticket | Refusal:
    return quotas.enter(name, quota, number or next(NUMBERS), **when)


def test_requests_a_minute_hold_over_any_minute_but_for_a_short_burst() -> None:
    quotas, quota, taken = books(), Quota(requests_per_min=60), []
    now = NOON
    while now < NOON + 300:
        if isinstance(enter(quotas, "a", quota, now=now), Ticket):
            taken.append(now)
        now += 0.1
    for start in range(0, 240, 10):
        inside = sum(NOON + start <= one < NOON + start + 60 for one in taken)
        assert 58 <= inside <= 71, start


def test_after_the_time_that_was_told_a_request_is_taken_and_not_before() -> None:
    quotas, quota, now = books(), Quota(requests_per_min=6), NOON
    while isinstance(found := enter(quotas, "a", quota, now=now), Ticket):
        pass
    assert found.reason == "requests" and 0 < found.retry_after_s <= 10
    assert isinstance(enter(quotas, "a", quota, now=now + found.retry_after_s), Ticket)


def test_two_keys_with_quotas_of_three_to_one_get_three_to_one() -> None:
    quotas, draw = books(), random.Random(1)
    limits = {"large": Quota(requests_per_min=180), "small": Quota(requests_per_min=60)}
    taken = {"large": 0, "small": 0}
    for number in range(120_000):  # two minutes, each asks 500 times a second
        name = draw.choice(("large", "small"))
        now = NOON + number / 1000
        taken[name] += isinstance(enter(quotas, name, limits[name], now=now), Ticket)
    assert taken["large"] / taken["small"] == pytest.approx(3, rel=0.1)


def test_open_requests_are_counted_until_they_leave() -> None:
    quotas, quota = books(), Quota(concurrency=2)
    first, second = (enter(quotas, "a", quota, one, now=NOON) for one in (ONE, 2))
    assert isinstance(first, Ticket) and isinstance(second, Ticket)
    assert enter(quotas, "a", quota, now=NOON) == Refusal("concurrency", 1)
    quotas.leave("a", ONE, 0, now=NOON)
    assert isinstance(enter(quotas, "a", quota, now=NOON), Ticket)


def test_the_place_of_a_request_whose_process_is_gone_is_free_again() -> None:
    quotas, quota = books(), Quota(concurrency=1)
    assert isinstance(enter(quotas, "a", quota, now=NOON), Ticket)
    assert isinstance(enter(quotas, "a", quota, now=NOON + 100), Refusal), "it may be alive"
    assert isinstance(enter(quotas, "a", quota, now=NOON + 161), Ticket)


def test_tokens_that_were_booked_and_not_used_are_given_back() -> None:
    quotas, quota = books(), Quota(tokens_per_min=6000)
    ticket = enter(quotas, "a", quota, ONE, now=NOON)
    assert isinstance(ticket, Ticket) and ticket.left_tokens == 1000
    assert quotas.book("a", quota, ONE, 3000, now=NOON) is None
    assert enter(quotas, "a", quota, now=NOON) == Refusal("tokens", 20)
    quotas.leave("a", ONE, 500, now=NOON)
    assert isinstance(enter(quotas, "a", quota, now=NOON), Ticket)


def test_a_day_ends_at_midnight_utc_and_its_quota_is_never_passed() -> None:
    quotas, quota = books(), Quota(tokens_per_day=1000)
    ticket = enter(quotas, "a", quota, ONE, now=NOON)
    assert isinstance(ticket, Ticket)
    assert quotas.book("a", quota, ONE, 1001, now=NOON) == Refusal("day", 43_200)
    assert quotas.book("a", quota, ONE, 1000, now=NOON) is None
    assert enter(quotas, "a", quota, now=NOON) == Refusal("day", 43_200)
    assert isinstance(enter(quotas, "a", quota, now=NOON + 43_200), Ticket)


def test_a_request_that_left_before_it_entered_or_booked_takes_nothing() -> None:
    """Its caller went away, and the word of that overtook the others."""
    quotas, quota = books(), Quota(concurrency=1, tokens_per_day=1000)
    assert isinstance(enter(quotas, "a", Quota(), now=NOON), Ticket)
    quotas.leave("a", 1, 0, now=NOON)
    quotas.enter("a", quota, 1, now=NOON)
    quotas.book("a", quota, 1, 1000, now=NOON)
    assert quotas.days()["a"][1] == 0
    quotas = books()
    first = enter(quotas, "a", quota, ONE, now=NOON)
    assert isinstance(first, Ticket)
    quotas.leave("a", ONE, 0, now=NOON)
    quotas.book("a", quota, ONE, 1000, now=NOON)
    assert isinstance(enter(quotas, "a", quota, now=NOON), Ticket)
    assert quotas.days()["a"][1] == 0


def test_what_was_used_today_before_a_restart_counts() -> None:
    quota = Quota(tokens_per_day=1000)
    assert isinstance(enter(books(), "a", quota, now=NOON, today=1000), Refusal)


def test_a_quota_that_is_changed_holds_at_once() -> None:
    quotas = books()
    assert isinstance(enter(quotas, "a", Quota(concurrency=1), now=NOON), Ticket)
    assert isinstance(enter(quotas, "a", Quota(concurrency=1), now=NOON), Refusal)
    assert isinstance(enter(quotas, "a", Quota(concurrency=2), now=NOON), Ticket)


def test_keys_do_not_use_each_others_quota() -> None:
    quotas, quota = books(), Quota(requests_per_min=6, concurrency=1)
    assert isinstance(enter(quotas, "a", quota, now=NOON), Ticket)
    assert isinstance(enter(quotas, "b", quota, now=NOON), Ticket)


def test_what_was_booked_yesterday_gives_nothing_to_today() -> None:
    quotas, quota, midnight = books(), Quota(tokens_per_day=1000), NOON + 43_200
    late = enter(quotas, "a", quota, ONE, now=midnight - 1)
    assert isinstance(late, Ticket)
    assert quotas.book("a", quota, ONE, 1000, now=midnight - 1) is None
    early = enter(quotas, "a", quota, 2, now=midnight + 1)
    assert isinstance(early, Ticket)
    quotas.leave("a", ONE, 0, now=NOON)
    assert quotas.days()["a"][1] == 0
    assert quotas.book("a", quota, 2, 1001, now=midnight + 1) is not None


def test_a_request_that_entered_before_the_books_were_lost_still_gives_its_rest_back() -> None:
    quotas, quota = books(), Quota(tokens_per_day=1000)
    assert quotas.book("a", quota, 7, 600, now=NOON) is None
    quotas.leave("a", 7, 100, now=NOON)
    assert quotas.days()["a"][1] == 100


def test_a_request_whose_end_overtakes_the_first_words_of_its_key_holds_no_place() -> None:
    quotas, quota = books(), Quota(concurrency=1)
    quotas.leave("a", ONE, 0, now=NOON)
    assert isinstance(enter(quotas, "a", quota, ONE, now=NOON), Ticket)
    assert isinstance(enter(quotas, "a", quota, 2, now=NOON), Ticket)
