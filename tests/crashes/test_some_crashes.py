# SPDX-License-Identifier: Apache-2.0
"""Twelve crash points of each commit; `make show-crashes` runs all of them."""

from tests.crashes.harness import run_points
from tests.crashes.workbench import Workbench


def test_a_killed_job_is_finished_by_one_resume(bench: Workbench) -> None:
    results = run_points(bench, 12, 1, out=None)
    failed = [f"{one.name} {one.point}: {one.problem}" for one in results if one.problem]
    assert not failed, "\n".join(failed)
    assert sum(one.is_reached for one in results) >= 11
