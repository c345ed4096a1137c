# SPDX-License-Identifier: Apache-2.0
"""At most so many rows are decoded or in process, in the order of the requests."""

import asyncio

import pytest

from sg4v_ray.exactly_once.capacity import rows_per_decode_task
from sg4v_ray.exactly_once.part_actor import RowBudget


def run_all(budget: RowBudget, sizes: list[int]) -> tuple[int, list[int]]:
    """Acquire all sizes at once; return the most rows held, and the order of the calls."""
    held = most = 0
    order: list[int] = []

    async def one(number: int, rows: int) -> None:
        nonlocal held, most
        await budget.acquire(rows)
        order.append(number)
        held += rows
        most = max(most, held)
        for _ in range(number % 3 + 1):
            await asyncio.sleep(0)
        held -= rows
        budget.release(rows)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number, rows) for number, rows in enumerate(sizes)))

    asyncio.run(all_of_them())
    return most, order


def test_no_more_rows_are_held_than_the_budget_has() -> None:
    budget = RowBudget(32)
    most, order = run_all(budget, [16, 8, 16, 3, 32, 16, 1, 30])
    assert most <= 32
    assert order == sorted(order)
    assert run_all(budget, [32])[1] == [0]  # everything was given back


def test_a_cancelled_request_gives_its_rows_to_the_next() -> None:
    async def cancel_the_first_waiter() -> None:
        budget = RowBudget(4)
        await budget.acquire(4)
        waiting = [asyncio.ensure_future(budget.acquire(4)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        budget.release(4)
        await asyncio.wait_for(waiting[1], timeout=10)
        assert waiting[0].cancelled()

    asyncio.run(cancel_the_first_waiter())


@pytest.mark.parametrize(
    ("capacity", "at_most", "rows"),
    [(1, 16, 1), (2, 16, 1), (5, 16, 2), (8, 16, 4), (53, 16, 15), (64, 16, 16), (512, 128, 128)],
)
def test_decode_tasks_use_all_rows_in_flight_and_leave_half_of_the_engine_fed(
    capacity: int, at_most: int, rows: int
) -> None:
    assert rows_per_decode_task(capacity, at_most) == rows


def test_no_decode_task_is_larger_than_half_of_the_capacity_or_leaves_an_eighth_unused() -> None:
    for capacity in range(1, 1000):
        rows = rows_per_decode_task(capacity, 16)
        assert 1 <= rows <= (capacity + 1) // 2
        assert 2 * capacity % rows <= capacity / 8
