# SPDX-License-Identifier: Apache-2.0
"""Kills a job at crash points, resumes it once, checks the result, and reports all points."""

import dataclasses
import itertools
import json
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.storage import STORAGE_ERRORS
from sg4v_ray.core.text_table import text_table
from tests.crashes import checks
from tests.crashes.choice import choose
from tests.crashes.events import Moment, Point
from tests.crashes.workbench import Workbench, forget

STORES = ("local", "s3")
_LOG_CHARS = 4000


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one point."""

    point: Point
    name: str
    is_reached: bool
    """The kill or cut happened. A point that a run does not reach shows nothing."""
    problem: str | None
    killed_run_s: float
    resume_s: float
    check_s: float
    state: tuple[str, ...] = ()
    """Objects below the root after the kill, for a point that failed."""
    log: str = ""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    trace: list[Moment]
    outcome: dict[str, Any]


def reference(bench: Workbench, store: str) -> Reference:
    """Run the job without a kill and check its result by the same checks."""
    place = bench.place(f"{store}-reference", store)
    run, is_finished = bench.drive(place)
    assert is_finished, (place.folder / "driver.log").read_text()[-_LOG_CHARS:]
    outcome = checks.outcome(place)
    checks.check(place, outcome)
    forget(place)
    return Reference(run.trace, outcome)


def run_point(bench: Workbench, point: Point, name: str, expected: dict[str, Any]) -> Result:
    """Run the job until it is killed, resume it once, and check the result."""
    place = bench.place(name, point.store)
    times = [time.monotonic()]
    problem, state, is_reached = None, [], False
    try:
        run, is_finished = bench.drive(place, point)
        is_reached = run.is_over
        times.append(time.monotonic())
        state = sorted(place.storage.list())
        problem = _check_first_run(point, run.killed, is_reached, is_finished)
        _, is_finished = bench.drive(place)
        times.append(time.monotonic())
        if not is_finished:
            problem = "the resume failed"
        elif problem is None:
            checks.check(place, expected)
    except (AssertionError, Sg4vError, ValueError, LookupError, *STORAGE_ERRORS) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__} in {where.name}: {str(error)[:1000]} ({where.line})"
    times += [time.monotonic()] * (4 - len(times))
    log = place.folder / "driver.log"
    result = Result(
        point=point,
        name=name,
        is_reached=is_reached,
        problem=problem,
        killed_run_s=round(times[1] - times[0], 2),
        resume_s=round(times[2] - times[1], 2),
        check_s=round(times[3] - times[2], 2),
        state=tuple(state) if problem else (),
        log=log.read_text()[-_LOG_CHARS:] if problem and log.exists() else "",
    )
    if problem is None:
        forget(place)
    return result


def _check_first_run(
    point: Point, killed: list[int], is_reached: bool, is_finished: bool
) -> str | None:
    if not is_reached:
        return None
    if point.victim in ("driver", "all"):
        return "the job finished although its driver was killed" if is_finished else None
    if point.victim == "actor" and not killed:
        return "there was no actor to kill"
    return None if is_finished else "the job did not survive a lost actor or connection"


def run_points(bench: Workbench, num_points: int, seed: int, *, out: Path | None) -> list[Result]:
    """Choose points, run them all and write the results as they come."""
    references = {store: reference(bench, store) for store in STORES}
    points = choose({store: one.trace for store, one in references.items()}, num_points, seed)
    results: list[Result] = []
    for number, point in enumerate(points):
        result = run_point(bench, point, f"p{number:04d}", references[point.store].outcome)
        results.append(result)
        spent = f"{result.killed_run_s:.1f} + {result.resume_s:.1f} + {result.check_s:.1f} s"
        verdict = result.problem or ("ok" if result.is_reached else "NOT REACHED")
        print(f"{number + 1}/{len(points)} {point}: {verdict} ({spent})", flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(one.plain()) for one in results]
            out.write_text("[" + ",\n".join(lines) + "]\n")
    return results


def table(results: list[Result]) -> str:
    """Return the numbers of reached points by victim, store and phase, and all failures."""
    reached = [one.point for one in results if one.is_reached]
    phases = ("before", "written", "linked", "after")
    counts = Counter((one.victim, one.store, one.moment.phase) for one in reached)
    cells = [["victim", "store", *phases, "all"]]
    for victim, store in itertools.product(("driver", "actor", "all", "connection"), STORES):
        numbers = [counts[victim, store, phase] for phase in phases]
        cells.append([victim, store, *map(str, (*numbers, sum(numbers)))])
    lines = [text_table(cells)]
    steps = Counter(one.moment.request.step for one in reached)
    lines.append(", ".join(f"{count} in {step}" for step, count in sorted(steps.items())))
    failed = [one for one in results if one.problem is not None]
    missed = [one for one in results if not one.is_reached]
    lines.append(f"{len(reached)} points, {len(failed)} failed, {len(missed)} not reached")
    lines += [f"FAILED {one.name} {one.point}: {one.problem}" for one in failed]
    lines += [f"not reached: {one.point}" for one in missed]
    return "\n".join(lines)
