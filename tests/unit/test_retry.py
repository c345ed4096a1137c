# SPDX-License-Identifier: Apache-2.0
"""Errors that may pass are tried again, others never; pauses grow to a bound."""

import asyncio

import pytest

from sg4v_ray.core.errors import TeacherBusy, TeacherUnusable
from sg4v_ray.core.retry import RetryPolicy, retrying

POLICY = RetryPolicy(max_tries=4, first_delay_s=1.0, max_delay_s=3.0)


class Flaky:
    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls, self.pauses = list(errors), 0, []

    async def call(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def run(self) -> str:
        return asyncio.run(retrying(self.call, on=(TeacherBusy,), policy=POLICY, sleep=self.sleep))


def test_it_tries_until_it_works() -> None:
    flaky = Flaky(TeacherBusy("429"), TeacherBusy("503"))
    assert flaky.run() == "done"
    assert flaky.calls == 3


def test_it_gives_up_after_max_tries_with_the_last_error() -> None:
    flaky = Flaky(*(TeacherBusy(str(n)) for n in range(9)))
    with pytest.raises(TeacherBusy, match="3"):
        flaky.run()
    assert flaky.calls == 4


def test_an_error_of_another_type_is_not_tried_again() -> None:
    flaky = Flaky(TeacherUnusable("401"))
    with pytest.raises(TeacherUnusable):
        flaky.run()
    assert flaky.calls == 1


def test_pauses_stay_below_a_growing_bound() -> None:
    assert [POLICY.bound_s(n) for n in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 3.0]
    flaky = Flaky(*(TeacherBusy(str(n)) for n in range(3)))
    flaky.run()
    assert all(0 <= pause <= POLICY.bound_s(n) for n, pause in enumerate(flaky.pauses, 1))
