# SPDX-License-Identifier: Apache-2.0
"""A row that kills an engine twice is found, and its neighbours are not blamed."""

import asyncio

from sg4v_ray.batch.generate import row_seed
from sg4v_ray.batch.strikes import MAX_STRIKES, Gate, Strikes


def test_rows_that_come_out_alive_have_no_strikes() -> None:
    notes = Strikes()
    assert notes.enter("e1", ["a", "b"]) == {}
    notes.leave("e1", ["a", "b"])
    notes.died("e1")
    assert notes.enter("e1", ["a", "b"]) == {}


def test_every_row_inside_a_dying_engine_gets_one_strike() -> None:
    notes = Strikes()
    notes.enter("e1", ["a", "b"])
    notes.enter("e2", ["c"])
    notes.leave("e1", ["b"])
    notes.died("e1")
    assert notes.enter("e1", ["a", "b", "c"]) == {"a": 1}


def test_a_suspect_that_waits_for_its_turn_is_not_blamed_for_another() -> None:
    notes = Strikes()
    notes.enter("e1", ["a", "b"])
    notes.died("e1")
    assert notes.enter("e1", ["a", "b"]) == {"a": 1, "b": 1}
    notes.enter_alone("e1", "a")
    notes.died("e1")
    assert notes.enter("e1", ["a", "b"]) == {"a": MAX_STRIKES, "b": 1}


def test_a_suspect_that_comes_out_alive_is_forgotten() -> None:
    notes = Strikes()
    notes.enter("e1", ["a"])
    notes.died("e1")
    notes.enter_alone("e1", "a")
    notes.leave("e1", ["a"])
    assert notes.enter("e1", ["a"]) == {}


def test_one_row_is_alone_inside_and_the_others_wait() -> None:
    inside: list[str] = []
    most: dict[str, int] = {}

    async def row(gate: Gate, name: str, *, alone: bool) -> None:
        async with gate.alone() if alone else gate.together():
            inside.append(name)
            for _ in range(3):
                most[name] = max(most.get(name, 0), len(inside))
                await asyncio.sleep(0)
            inside.remove(name)

    async def run() -> None:
        gate = Gate()
        rows = [row(gate, f"r{n}", alone=n % 4 == 3) for n in range(16)]
        await asyncio.wait_for(asyncio.gather(*rows), 10)

    asyncio.run(run())
    assert all(most[f"r{n}"] == 1 for n in range(3, 16, 4))
    assert most["r0"] == 3


def test_an_error_inside_lets_the_others_in() -> None:
    async def run() -> None:
        gate = Gate()
        for door in (gate.alone, gate.together):
            try:
                async with door():
                    raise KeyError
            except KeyError:
                pass
        async with asyncio.timeout(10), gate.alone():
            pass

    asyncio.run(run())


def test_a_seed_depends_on_the_row_the_attempt_and_the_config_only() -> None:
    seeds = {
        row_seed(key, attempt=attempt, config=config)
        for key in ("a", "b")
        for attempt in (1, 2)
        for config in ("x", "y")
    }
    assert len(seeds) == 8
    assert all(0 <= one < 2**63 for one in seeds)
    assert row_seed("a", attempt=1, config="x") == row_seed("a", attempt=1, config="x")
