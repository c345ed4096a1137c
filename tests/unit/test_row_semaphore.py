# SPDX-License-Identifier: Apache-2.0
"""At most so many rows are decoded or in process, in the order of the requests."""

import asyncio
from collections.abc import Callable

import pyarrow as pa
import pytest
from ray.data import ExecutionResources

from sg4v_ray.exactly_once.capacity import parts_at_once, rows_per_decode_task
from sg4v_ray.exactly_once.part_actor import PartActor, RowSemaphore, without_images


def run_all(semaphore: RowSemaphore, sizes: list[int]) -> tuple[int, list[int]]:
    """Acquire all sizes at once; return the most rows held, and the order of the calls."""
    held = most = 0
    order: list[int] = []

    async def one(number: int, rows: int) -> None:
        nonlocal held, most
        await semaphore.acquire(rows)
        order.append(number)
        held += rows
        most = max(most, held)
        for _ in range(number % 3 + 1):
            await asyncio.sleep(0)
        held -= rows
        semaphore.release(rows)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number, rows) for number, rows in enumerate(sizes)))

    asyncio.run(all_of_them())
    return most, order


def test_no_more_rows_are_held_than_the_budget_has() -> None:
    semaphore = RowSemaphore(32)
    most, order = run_all(semaphore, [16, 8, 16, 3, 32, 16, 1, 30])
    assert most <= 32
    assert order == sorted(order)
    assert run_all(semaphore, [32])[1] == [0]  # everything was given back


def test_a_cancelled_request_gives_its_rows_to_the_next() -> None:
    async def cancel_the_first_waiter() -> None:
        semaphore = RowSemaphore(4)
        await semaphore.acquire(4)
        waiting = [asyncio.ensure_future(semaphore.acquire(4)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        semaphore.release(4)
        await asyncio.wait_for(waiting[1], timeout=10)
        assert waiting[0].cancelled()

    asyncio.run(cancel_the_first_waiter())


class OneRowFails(PartActor):
    """Raises for a slice while other rows of it are in process, and releases those later."""

    def __init__(self) -> None:  # no base: that reports to a cluster
        self._rows_in_flight = RowSemaphore(4)
        self.late: list[Callable[[], None]] = []

    async def _decoded(self, rows: pa.Table) -> pa.Table:
        return rows

    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        release_row()
        self.late += [release_row] * 2
        raise ValueError("the third row")


def test_rows_of_a_failed_slice_are_released_once() -> None:
    actor = OneRowFails()
    with pytest.raises(ValueError, match="third"):
        asyncio.run(actor._process_slice(pa.table({"id": ["a", "b", "c"]})))
    for release_row in actor.late:
        release_row()
    assert run_all(actor._rows_in_flight, [2, 2, 2])[0] == 4, "as many as before"


def test_rows_without_images_do_not_keep_the_object_that_had_them() -> None:
    rows = pa.table({"id": ["a", "b"], "image": [b"1" * 1000, None], "reject": [None, "corrupt"]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    stored = bytearray(sink.getvalue())  # stands for an object of Ray's store
    view = pa.ipc.open_stream(pa.py_buffer(stored)).read_all()
    with pytest.raises(BufferError):
        stored.append(0)
    kept = without_images(view)
    del view
    stored.append(0)
    assert kept.to_pydict() == {"id": ["a", "b"], "reject": [None, "corrupt"]}


@pytest.mark.parametrize(
    ("capacity", "at_most", "rows"),
    [(1, 16, 1), (2, 16, 1), (5, 16, 2), (8, 16, 4), (53, 16, 13), (64, 16, 16), (512, 128, 128)],
)
def test_decode_tasks_use_all_rows_in_flight_and_leave_half_of_the_engine_fed(
    capacity: int, at_most: int, rows: int
) -> None:
    assert rows_per_decode_task(capacity, at_most) == rows


def test_no_decode_task_is_larger_than_half_of_the_capacity_or_leaves_a_third_unused() -> None:
    for capacity in range(1, 1000):
        rows = rows_per_decode_task(capacity, 16)
        assert 1 <= rows <= (capacity + 1) // 2
        assert capacity % rows <= capacity / (3 if capacity < 20 else 10)


@pytest.mark.parametrize(
    ("rows_in_flight", "rows_per_part", "parts"),
    [(32, 512, 2), (32, 32, 2), (32, 20, 4), (9, 1, 16)],
)
def test_an_actor_works_on_more_parts_than_its_rows_in_flight_fill(
    rows_in_flight: int, rows_per_part: int, parts: int
) -> None:
    assert parts_at_once(rows_in_flight, rows_per_part) == parts
    # The number of nodes that Ray Data computes for a pool must not be rounded down.
    per_call = ExecutionResources(cpu=1, gpu=1).scale(1 / parts)
    assert per_call.scale(parts * 7).gpu == 7
