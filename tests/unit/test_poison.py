# SPDX-License-Identifier: Apache-2.0
"""A row that crashes an engine is found, no other row is rejected, preemption blames none."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_ray.exactly_once.poison import (
    REJECT_DETAIL,
    CrashTracker,
    DeathCause,
    Life,
    SharedExclusiveLock,
    Suspicion,
    next_probe,
    run_suspects,
    run_tracked,
)

MAX_DEATHS = 9
"""Promised: deaths until one poison row among 128 in flight is found, the first one included."""
ROWS = [f"r{n}" for n in range(128)]
NO_CRASH = [DeathCause.NODE_LOST, DeathCause.MEMORY_MONITOR, DeathCause.STOPPED]


def crash_together(tracker: CrashTracker, ids: Sequence[str], engine: str = "e1") -> None:
    assert tracker.enter(engine, ids) == {}
    tracker.died(engine, DeathCause.CRASHED)


def crash_probe(tracker: CrashTracker, ids: Sequence[str], engine: str = "e1") -> None:
    tracker.enter_probe(engine, ids)
    tracker.died(engine, DeathCause.CRASHED)


# --- the rules -----------------------------------------------------------------------------------


def test_rows_that_leave_alive_are_no_suspects() -> None:
    tracker = CrashTracker()
    tracker.enter("e1", ["a", "b"])
    tracker.leave("e1", ["a", "b"])
    tracker.died("e1", DeathCause.CRASHED)
    assert tracker.suspicion(["a", "b"]) == {}


def test_a_crash_makes_a_group_of_the_rows_inside_that_engine() -> None:
    tracker = CrashTracker()
    tracker.enter("e1", ["a", "b", "c"])
    tracker.enter("e1", ["d"])
    tracker.enter("e2", ["x"])
    tracker.leave("e1", ["c"])
    tracker.died("e1", DeathCause.CRASHED)
    found = tracker.suspicion(["d", "x", "c", "b", "a"])
    assert list(found) == ["d", "b", "a"]
    assert set(found.values()) == {Suspicion(found["a"].group, size=3, crashes=1)}


def test_rows_do_not_go_in_together_with_a_suspect() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a"])
    assert list(tracker.enter("e1", ["a", "new"])) == ["a"]
    tracker.died("e1", DeathCause.CRASHED)
    assert tracker.suspicion(["new"]) == {}, "it was not inside"


@pytest.mark.parametrize("cause", NO_CRASH)
def test_other_deaths_blame_no_row(cause: DeathCause) -> None:
    tracker = CrashTracker()
    tracker.enter("e1", ROWS)
    tracker.died("e1", cause)
    assert tracker.enter("e2", ROWS) == {}
    tracker.died("e2", cause)
    tracker.died("e1", DeathCause.CRASHED)
    assert tracker.suspicion(ROWS) == {}, "a death is reported once"


@pytest.mark.parametrize("cause", NO_CRASH)
def test_other_deaths_during_a_probe_leave_the_suspicion_as_it_was(cause: DeathCause) -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a", "b"])
    before = tracker.suspicion(["a", "b"])
    tracker.enter_probe("e1", ["a"])
    tracker.died("e1", cause)
    assert tracker.suspicion(["a", "b"]) == before


def test_a_crash_of_a_probe_clears_the_rest_of_its_group() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a", "b", "c", "d"])
    crash_probe(tracker, ["a", "b"])
    assert list(tracker.suspicion(["a", "b", "c", "d"])) == ["a", "b"]
    assert tracker.suspicion(["a"])["a"].crashes == 2


def test_a_probe_that_comes_out_alive_is_cleared_and_the_rest_is_not() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a", "b", "c", "d"])
    tracker.enter_probe("e1", ["a", "b"])
    tracker.leave("e1", ["a", "b"])
    found = tracker.suspicion(["a", "b", "c", "d"])
    assert {key: one.size for key, one in found.items()} == {"c": 2, "d": 2}


def test_a_row_that_crashes_the_engine_alone_is_condemned_for_good() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a", "b"])
    crash_probe(tracker, ["a"])
    assert tracker.suspicion(["a"])["a"] == Suspicion(0, 1, crashes=2, is_condemned=True)
    tracker.leave("e1", ["a", "b"])  # its part was processed, but is made again after a restart
    assert tracker.enter("e2", ["a", "b"])["a"].is_condemned


def test_a_first_crash_condemns_no_row_even_if_it_was_the_only_one() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a"])
    assert not tracker.suspicion(["a"])["a"].is_condemned
    crash_probe(tracker, ["a"])
    assert tracker.suspicion(["a"])["a"].is_condemned


def test_an_engine_that_dies_while_it_loads_blames_no_row() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a", "b"])
    for _ in range(3):
        tracker.died("e1", DeathCause.CRASHED)
    assert {one.crashes for one in tracker.suspicion(["a", "b"]).values()} == {1}


def test_rows_of_a_crashed_group_may_be_blamed_again_in_another_group() -> None:
    tracker = CrashTracker()
    tracker.enter("e1", ["a", "b"])
    tracker.enter("e2", ["b", "c"])  # the part of b was sent twice
    tracker.died("e1", DeathCause.CRASHED)
    tracker.died("e2", DeathCause.CRASHED)
    found = tracker.suspicion(["a", "b", "c"])
    assert found["a"].group != found["b"].group == found["c"].group
    assert [one.size for one in found.values()] == [1, 2, 2]
    assert [one.crashes for one in found.values()] == [1, 2, 1]


def test_a_row_that_was_sent_twice_is_cleared_by_the_engine_that_it_left_alive() -> None:
    tracker = CrashTracker()
    tracker.enter("e1", ["a", "b"])
    tracker.enter("e2", ["a", "b"])
    tracker.died("e1", DeathCause.CRASHED)
    tracker.leave("e2", ["a", "b"])
    assert tracker.suspicion(["a", "b"]) == {}


def test_a_probe_that_ended_with_an_error_is_not_inside_with_later_rows() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a"])
    tracker.enter_probe("e1", ["a"])
    crash_together(tracker, ["b"])
    found = tracker.suspicion(["a", "b"])
    assert not found["a"].is_condemned and not found["b"].is_condemned
    assert found["a"].group != found["b"].group


def test_a_condemned_row_that_was_sent_twice_is_in_no_group() -> None:
    tracker = CrashTracker()
    tracker.enter("e2", ["a", "b"])
    crash_together(tracker, ["a"])
    crash_probe(tracker, ["a"])
    tracker.died("e2", DeathCause.CRASHED)
    found = tracker.suspicion(["a", "b"])
    assert found["a"] == Suspicion(0, 1, crashes=2, is_condemned=True)
    assert found["b"].size == 1


def test_two_probes_of_one_group_that_both_crash_stay_two_groups() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a", "b", "c", "d"])
    tracker.enter_probe("e1", ["a", "b"])
    tracker.enter_probe("e2", ["c", "d"])
    tracker.died("e1", DeathCause.CRASHED)
    assert list(tracker.suspicion(["c", "d"])) == [], "cleared, but still inside e2"
    tracker.died("e2", DeathCause.CRASHED)
    found = tracker.suspicion(["a", "b", "c", "d"])
    assert [one.size for one in found.values()] == [2, 2, 2, 2]


# --- unknown causes ------------------------------------------------------------------------------


def test_an_unknown_death_gives_the_rows_one_more_try_together() -> None:
    tracker = CrashTracker()
    tracker.enter("e1", ["a", "b", "c"])
    tracker.died("e1", DeathCause.UNKNOWN)
    assert tracker.enter("e1", ["a", "b", "new"]) == {}
    tracker.died("e1", DeathCause.UNKNOWN)
    assert list(tracker.suspicion(["a", "b", "c", "new"])) == ["a", "b"]


def test_an_unknown_death_is_forgotten_when_the_rows_leave_alive() -> None:
    tracker = CrashTracker()
    for _ in range(2):
        tracker.enter("e1", ["a", "b"])
        tracker.died("e1", DeathCause.UNKNOWN)
        assert tracker.enter("e1", ["a", "b"]) == {}
        tracker.leave("e1", ["a", "b"])


def test_the_log_names_condemned_rows_only(caplog: pytest.LogCaptureFixture) -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a"])
    tracker.enter_probe("e1", ["a"])
    tracker.died("e1", DeathCause.UNKNOWN)
    assert "condemned" not in caplog.text
    crash_probe(tracker, ["a"])
    assert "condemned, crashes the engine: a" in caplog.text


def test_preemption_between_two_unknown_deaths_changes_nothing() -> None:
    tracker = CrashTracker()
    for cause in (DeathCause.UNKNOWN, DeathCause.NODE_LOST, DeathCause.UNKNOWN):
        assert tracker.enter("e1", ["a"]) == {}
        tracker.died("e1", cause)
    assert list(tracker.suspicion(["a"])) == ["a"]


@pytest.mark.parametrize("first", [[DeathCause.CRASHED], [DeathCause.UNKNOWN] * 2])
def test_it_takes_two_unknown_deaths_alone_to_condemn_a_row(first: list[DeathCause]) -> None:
    tracker = CrashTracker()
    for cause in first:
        tracker.enter("e1", ["a", "b"])
        tracker.died("e1", cause)
    for is_condemned in (False, True):
        tracker.enter_probe("e1", ["a"])
        tracker.died("e1", DeathCause.UNKNOWN)
        assert tracker.suspicion(["a"])["a"].is_condemned == is_condemned


# --- lives ---------------------------------------------------------------------------------------


def test_a_life_that_ends_before_it_reports_does_not_hide_the_one_before() -> None:
    tracker = CrashTracker()
    first, third = Life("w1", "n1"), Life("w3", "n2")
    assert tracker.previous_life("e1") is None
    tracker.started("e1", first, None)
    tracker.enter("e1", ["a"])
    assert tracker.previous_life("e1") == first  # asked by the second life, which dies then
    assert tracker.previous_life("e1") == first  # asked by the third
    tracker.started("e1", third, DeathCause.CRASHED)
    assert tracker.previous_life("e1") == third
    assert list(tracker.suspicion(["a"])) == ["a"]


def test_a_death_that_the_driver_reported_is_not_asked_for_again() -> None:
    tracker = CrashTracker()
    tracker.started("e1", Life("w1", "n1"), None)
    tracker.died("e1", DeathCause.STOPPED)
    assert tracker.previous_life("e1") is None


def test_engines_of_an_ended_plan_are_forgotten_and_its_suspects_are_not() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a"])
    tracker.started("e2", Life("w", "n"), None)
    tracker.enter("e2", ["b"])
    tracker.drop_engines()
    assert tracker.previous_life("e2") is None
    tracker.died("e2", DeathCause.CRASHED)
    assert list(tracker.suspicion(["a", "b"])) == ["a"]


# --- the next probe ------------------------------------------------------------------------------


def suspects(group: int, size: int, ids: Sequence[str]) -> dict[str, Suspicion]:
    return {one: Suspicion(group, size, crashes=1) for one in ids}


def test_a_group_that_is_here_as_a_whole_is_probed_by_halves() -> None:
    assert next_probe(suspects(1, 4, "abcd")) == ["a", "b"]
    assert next_probe(suspects(1, 3, "abc")) == ["a", "b"]
    assert next_probe(suspects(1, 1, "a")) == ["a"]


def test_a_group_that_is_partly_elsewhere_is_probed_as_a_whole() -> None:
    assert next_probe(suspects(1, 5, "abcd")) == ["a", "b", "c", "d"]


def test_groups_are_probed_one_after_the_other_and_condemned_rows_never() -> None:
    mixed = suspects(1, 2, "a") | suspects(2, 2, "xy") | suspects(1, 2, "b")
    assert next_probe(mixed) == ["a"]
    condemned = {"c": Suspicion(0, 1, crashes=2, is_condemned=True)}
    assert next_probe(condemned | suspects(2, 2, "xy")) == ["x"]
    assert next_probe(condemned) == []


# --- simulations ---------------------------------------------------------------------------------


@dataclass
class _Client:
    """Calls of one engine to the tracker, which yield to other tasks as remote calls do."""

    tracker: CrashTracker
    engine: str

    async def enter(self, ids: list[str]) -> dict[str, Suspicion]:
        await asyncio.sleep(0)
        return self.tracker.enter(self.engine, ids)

    async def enter_probe(self, ids: list[str]) -> None:
        self.tracker.enter_probe(self.engine, ids)
        await asyncio.sleep(0)

    async def leave(self, ids: list[str]) -> None:
        self.tracker.leave(self.engine, ids)
        await asyncio.sleep(0)

    async def suspicion(self, ids: list[str]) -> dict[str, Suspicion]:
        await asyncio.sleep(0)
        return self.tracker.suspicion(ids)


@dataclass
class _Cluster:
    """Engines that run parts of rows, die by their poison rows or by fate, and are restarted."""

    parts: list[list[str]]
    poison: set[str]
    engines: int = 1
    parts_at_once: int = 4
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    fate: Callable[[], DeathCause | None] = lambda: None
    """Called for every batch of rows; returns a death that no row has caused."""
    report_late: bool = False
    """Rows of a dead engine are sent again before its death is reported."""
    tracker: CrashTracker = field(default_factory=CrashTracker)
    outcomes: dict[str, str] = field(default_factory=dict)
    crashes: int = 0
    batches: list[int] = field(default_factory=list)
    """Rows of every call of an engine."""
    inside: int = 0
    most_inside: int = 0

    def run(self) -> None:
        asyncio.run(asyncio.wait_for(self._run(), 60))
        assert set(self.outcomes) == {one for part in self.parts for one in part}

    @property
    def rejected(self) -> set[str]:
        return {key for key, outcome in self.outcomes.items() if outcome != "alive"}

    async def _run(self) -> None:
        self._waiting = list(self.parts)
        self._running = 0
        await asyncio.gather(*(self._engine(f"e{n}") for n in range(self.engines)))

    async def _engine(self, name: str) -> None:
        while self._waiting or self._running:
            taken = [
                self._waiting.pop(self.draw.randrange(len(self._waiting)))
                for _ in range(min(self.parts_at_once, len(self._waiting)))
            ]
            self._running += 1
            if taken:
                await self._life(name, taken)
            self._running -= 1
            await asyncio.sleep(0)

    async def _life(self, name: str, parts: list[list[str]]) -> None:
        """Run some parts; if the process ends, report it and give all of them back."""
        lock, ended = SharedExclusiveLock(), asyncio.get_running_loop().create_future()
        work = asyncio.gather(*(self._part(name, lock, ended, part) for part in parts))
        await asyncio.wait([work, ended], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            for one in work.result():
                self.outcomes.update(one)
            return
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        cause: DeathCause = ended.result()
        self.crashes += cause is DeathCause.CRASHED
        if self.report_late:
            self._waiting += parts
            for _ in range(self.draw.randrange(20)):
                await asyncio.sleep(0)
        self.tracker.died(name, cause)
        if not self.report_late:
            self._waiting += parts

    async def _part(
        self,
        name: str,
        lock: SharedExclusiveLock,
        ended: "asyncio.Future[DeathCause]",
        part: list[str],
    ) -> dict[str, str]:
        async def run(rows: Sequence[str]) -> list[str]:
            self.batches.append(len(rows))
            self.inside += len(rows)
            self.most_inside = max(self.most_inside, self.inside)
            for _ in range(self.draw.randrange(1, 5)):
                await asyncio.sleep(0)
            self.inside -= len(rows)
            cause = DeathCause.CRASHED if self.poison & set(rows) else self.fate()
            if cause is not None:
                if not ended.done():
                    ended.set_result(cause)
                await asyncio.Event().wait()
            return ["alive" for _ in rows]

        client = _Client(self.tracker, name)
        outcomes = await run_tracked(
            {one: one for one in part},
            run=run,
            condemn=lambda row, detail: detail,
            tracker=client,
            lock=lock,
        )
        await client.leave(part)
        return outcomes


def split(ids: Sequence[str], size: int) -> list[list[str]]:
    return [list(ids[first : first + size]) for first in range(0, len(ids), size)]


@pytest.mark.parametrize("size", [128, 127, 32, 16, 1])
def test_a_poison_row_at_any_position_is_found_within_nine_deaths(size: int) -> None:
    calls = split(ROWS, size)
    for poison in ROWS:
        cluster = _Cluster(calls, {poison}, parts_at_once=len(calls))
        cluster.run()
        assert cluster.rejected == {poison}
        assert cluster.crashes <= MAX_DEATHS
        assert cluster.outcomes[poison] == REJECT_DETAIL.format(crashes=cluster.crashes)


def test_the_worst_case_needs_nine_deaths() -> None:
    """One row of the group is elsewhere, and the poison is always in the half probed first."""
    cluster = _Cluster([ROWS[:127]], {ROWS[0]})
    crash_together(cluster.tracker, ROWS)
    cluster.run()
    assert 1 + cluster.crashes == MAX_DEATHS


def test_calls_without_suspects_share_the_engine() -> None:
    cluster = _Cluster(split(ROWS, 32), set())
    cluster.run()
    assert cluster.most_inside == 128


def deaths_once(cause: DeathCause) -> Callable[[], DeathCause | None]:
    left = [cause]
    return lambda: left.pop() if left else None


@pytest.mark.parametrize("cause", [*NO_CRASH, DeathCause.UNKNOWN])
def test_after_a_preemption_all_rows_run_together_again(cause: DeathCause) -> None:
    cluster = _Cluster([ROWS], set(), fate=deaths_once(cause))
    cluster.run()
    assert not cluster.rejected
    assert cluster.batches == [128, 128]


def test_a_crash_that_no_row_has_caused_rejects_no_row() -> None:
    cluster = _Cluster([ROWS], set(), fate=deaths_once(DeathCause.CRASHED))
    cluster.run()
    assert not cluster.rejected
    assert cluster.batches == [128, 64, 32, 16, 8, 4, 2, 1, 1]


MANY = [f"r{n}" for n in range(4 * 128)]


@given(poison=st.sets(st.sampled_from(MANY), min_size=1, max_size=3), seed=st.integers(0, 2**32))
@settings(max_examples=100)
def test_poison_rows_are_found_on_engines_that_swap_parts(poison: set[str], seed: int) -> None:
    cluster = _Cluster(split(MANY, 32), poison, engines=4, draw=random.Random(seed))
    cluster.run()
    assert cluster.rejected == poison
    assert cluster.crashes <= MAX_DEATHS * len(poison)


@given(poison=st.sets(st.sampled_from(MANY), min_size=1, max_size=3), seed=st.integers(0, 2**32))
@settings(max_examples=50)
def test_a_late_report_of_a_death_rejects_no_other_row(poison: set[str], seed: int) -> None:
    cluster = _Cluster(
        split(MANY, 32), poison, engines=4, draw=random.Random(seed), report_late=True
    )
    cluster.run()
    assert cluster.rejected == poison


@given(position=st.integers(0, 127), seed=st.integers(0, 2**32), rate=st.floats(0, 0.3))
@settings(max_examples=100)
def test_preemption_hides_no_poison_and_rejects_no_row(
    position: int, seed: int, rate: float
) -> None:
    draw = random.Random(seed)
    cluster = _Cluster(
        split(ROWS, 32),
        {ROWS[position]},
        engines=2,
        draw=draw,
        fate=lambda: draw.choice(NO_CRASH) if draw.random() < rate else None,
    )
    cluster.run()
    assert cluster.rejected == {ROWS[position]}
    assert cluster.crashes <= MAX_DEATHS


@given(seed=st.integers(0, 2**32))
@settings(max_examples=50)
def test_the_tracker_remembers_only_condemned_rows(seed: int) -> None:
    bad = {"r3", "r4", "r99"}
    cluster = _Cluster(split(ROWS, 16), bad, engines=3, draw=random.Random(seed))
    cluster.run()
    tracker = cluster.tracker
    assert set(tracker.suspicion(ROWS)) == set(tracker._crashes) == bad
    assert not tracker._inside and not tracker._groups and not tracker._group_of
    assert not tracker._doubtful


def test_rows_that_another_engine_clears_are_left_without_an_outcome() -> None:
    tracker = CrashTracker()
    crash_together(tracker, ["a", "b"])

    async def run(rows: Sequence[str]) -> list[str]:
        tracker.leave("e2", ["b"])
        return ["alive" for _ in rows]

    async def probe() -> dict[str, str]:
        client = _Client(tracker, "e1")
        rows = {"a": "a", "b": "b"}
        return await run_suspects(rows, run=run, condemn=lambda row, detail: "", tracker=client)

    assert asyncio.run(probe()) == {"a": "alive"}


# --- the lock ------------------------------------------------------------------------------------


def test_an_exclusive_holder_is_alone_and_shared_holders_are_not() -> None:
    inside: list[str] = []
    most: dict[str, int] = {}

    async def row(lock: SharedExclusiveLock, name: str, *, alone: bool) -> None:
        async with lock.exclusive() if alone else lock.shared():
            inside.append(name)
            for _ in range(3):
                most[name] = max(most.get(name, 0), len(inside))
                await asyncio.sleep(0)
            inside.remove(name)

    async def run() -> None:
        lock = SharedExclusiveLock()
        rows = [row(lock, f"r{n}", alone=n % 4 == 3) for n in range(16)]
        await asyncio.wait_for(asyncio.gather(*rows), 10)

    asyncio.run(run())
    assert all(most[f"r{n}"] == 1 for n in range(3, 16, 4))
    assert most["r0"] == 3


def test_exclusive_waiters_go_before_later_shared_ones() -> None:
    order: list[str] = []

    async def enter(lock: SharedExclusiveLock, name: str, *, alone: bool = False) -> None:
        async with lock.exclusive() if alone else lock.shared():
            order.append(name)
            await asyncio.sleep(0.01)

    async def run() -> None:
        lock = SharedExclusiveLock()
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(enter(lock, "first"))
            await asyncio.sleep(0)
            for name in ("alone 1", "alone 2"):
                tasks.create_task(enter(lock, name, alone=True))
            await asyncio.sleep(0)
            tasks.create_task(enter(lock, "later"))

    asyncio.run(run())
    assert order == ["first", "alone 1", "alone 2", "later"]


def test_an_error_inside_releases_the_lock() -> None:
    async def run() -> None:
        lock = SharedExclusiveLock()
        for hold in (lock.exclusive, lock.shared):
            with pytest.raises(KeyError):
                async with hold():
                    raise KeyError
        async with asyncio.timeout(10), lock.exclusive():
            pass

    asyncio.run(run())


def test_a_cancelled_exclusive_waiter_blocks_no_shared_holder() -> None:
    async def hold(lock: SharedExclusiveLock, *, alone: bool) -> None:
        async with lock.exclusive() if alone else lock.shared():
            pass

    async def run() -> None:
        lock = SharedExclusiveLock()
        async with asyncio.timeout(10), lock.shared():
            waiter = asyncio.create_task(hold(lock, alone=True))
            await asyncio.sleep(0)
            later = asyncio.create_task(hold(lock, alone=False))
            await asyncio.sleep(0)
            waiter.cancel()
            await later

    asyncio.run(run())
