# SPDX-License-Identifier: Apache-2.0
"""A job that will end with too many rejects ends before the rest is paid for."""

from collections import Counter

import pytest

from sg4v_ray.core.errors import TooManyRejects
from sg4v_ray.core.rejects import RejectBudget

BUDGET = RejectBudget(max_reject_rate=0.02)


@pytest.mark.parametrize(
    ("rejects", "done", "total", "ends"),
    [
        pytest.param(20_000, 500_000, 1_200_000, False, id="within the budget"),
        pytest.param(24_000, 500_000, 1_200_000, False, id="the budget, to the last row"),
        pytest.param(24_001, 500_000, 1_200_000, True, id="certain, whatever comes"),
        pytest.param(900, 1000, 1_200_000, True, id="nearly all from the start"),
        pytest.param(900, 990, 1_200_000, False, id="too early to tell"),
        pytest.param(400, 1000, 1_200_000, False, id="a bad beginning"),
        pytest.param(60, 1000, 2000, True, id="a thousand rows more would be paid for"),
        pytest.param(60, 1001, 2000, False, id="the last rows are made and written"),
    ],
)
def test_what_is_foreseen(rejects: int, done: int, total: int, ends: bool) -> None:
    found = BUDGET.foresee(
        rejected=Counter(cut_off=rejects), done=done, left=total - done, total=total
    )
    assert (found is not None) == ends
    if found is not None:
        assert f"{rejects} cut_off" in str(found)


def test_a_budget_of_everything_ends_nothing() -> None:
    everything = RejectBudget(max_reject_rate=1.0)
    assert (
        everything.foresee(rejected=Counter(missing=5000), done=5000, left=5000, total=10_000)
        is None
    )


def test_the_share_of_all_rows_decides_at_the_end() -> None:
    BUDGET.check(rejected=Counter(missing=2), total=100)
    with pytest.raises(TooManyRejects, match="3 of 100 rows were rejected"):
        BUDGET.check(rejected=Counter(missing=3), total=100)


def test_reasons_that_are_not_named_are_counted() -> None:
    many = Counter(missing=9, truncated=8, corrupt=7, repeats=6, refused=5, too_short=3, cut_off=1)
    with pytest.raises(TooManyRejects, match="5 refused and 4 for other reasons"):
        BUDGET.check(rejected=many, total=100)
