# SPDX-License-Identifier: Apache-2.0
"""A job that is killed at any storage request is finished by one resume, and nothing is repaired.

`make show-crashes` runs this; SG4V_CRASH_POINTS and SG4V_CRASH_SEED change the choice of points.
"""

import os
from collections import Counter

import pytest

from tests.crashes.harness import run_points, table
from tests.crashes.workbench import REPOSITORY, Workbench

NUM_POINTS = int(os.environ.get("SG4V_CRASH_POINTS", "184"))
SEED = int(os.environ.get("SG4V_CRASH_SEED", "0"))
RESULTS = REPOSITORY / "runs/crashes/points.json"


@pytest.mark.crashes
@pytest.mark.timeout(3600)
def test_a_crash_at_every_step(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        results = run_points(bench, NUM_POINTS, SEED, out=RESULTS)
        print(table(results))
    failed = [f"{one.name} {one.point}: {one.problem}" for one in results if one.problem]
    assert not failed, "\n".join(failed)
    if NUM_POINTS >= 150:
        reached = [one.point for one in results if one.is_reached]
        victims = Counter(one.victim for one in reached)
        stores = Counter(one.store for one in reached)
        assert len(reached) >= 150
        assert min(victims[one] for one in ("driver", "actor", "all")) >= 30
        assert victims["connection"] >= 20
        assert min(stores.values()) >= 60
