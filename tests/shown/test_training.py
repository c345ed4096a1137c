# SPDX-License-Identifier: Apache-2.0
"""The figures that `make show-training`'s bench left are those that the paper's stages need."""

import json
from pathlib import Path

import pytest

from jobs.bench_training import RATIOS

pytestmark = pytest.mark.shown

FILE = Path(__file__).parents[2] / "runs" / "bench-training" / RATIOS


@pytest.mark.parametrize(
    ("figure", "most"),
    [
        ("plan_s_pretrain", 60),
        ("plan_s_finetune", 60),
        ("peak_mb", 2000),
        ("padding_share_pretrain", 0.02),
        ("padding_share_finetune", 0.06),
        ("step_time_over_bare", 1.03),
        ("data_wait_share", 0.01),
    ],
)
def test_plans_are_soon_built_and_pad_little_and_ray_costs_no_time(
    figure: str, most: float
) -> None:
    assert json.loads(FILE.read_text())[figure] <= most
