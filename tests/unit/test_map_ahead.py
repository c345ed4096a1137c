# SPDX-License-Identifier: Apache-2.0
"""A parallel map yields in order, takes a bounded number of items ahead, and raises in place."""

import threading
from collections.abc import Iterator

import pytest

from sg4v_ray.core.map_ahead import map_ahead


def test_results_come_in_the_order_of_the_items_although_calls_end_in_another_order() -> None:
    second_ended = threading.Event()

    def call(number: int) -> int:
        if number == 0:
            assert second_ended.wait(60)
        if number == 1:
            second_ended.set()
        return number * 10

    assert [*map_ahead(call, range(5), threads=2, ahead=2)] == [0, 10, 20, 30, 40]


def test_no_more_items_are_taken_than_ahead_allows() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(1, 1001):
            taken = number
            yield number

    results = map_ahead(str, items(), threads=4, ahead=8)
    assert taken == 0
    for yielded in range(1, 11):
        assert next(results) == str(yielded)
        assert taken == yielded + 8
    results.close()
    assert taken == 18


def test_an_error_is_raised_in_the_place_of_its_result() -> None:
    results = map_ahead(lambda number: 6 // number, [3, 2, 0, 1], threads=2, ahead=4)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
