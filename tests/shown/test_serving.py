# SPDX-License-Identifier: Apache-2.0
"""The figures that the serving bench left: Ray Serve costs little beside the bare engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.bench_serving import REPORT

pytestmark = pytest.mark.shown

FILE = Path(__file__).parents[2] / "runs" / "bench-serving" / REPORT


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def test_sixteen_clients_get_nine_tenths_of_the_bare_engines_tokens(report: dict[str, Any]) -> None:
    assert report["bench"]["clients"] == 16
    assert report["ratios"]["throughput_over_bare"] >= 0.90


def test_the_first_token_comes_at_most_30_ms_later(report: dict[str, Any]) -> None:
    assert report["bench"]["pairs"] >= 50
    assert report["ratios"]["ttft_p50_extra_ms"] <= 30


def test_no_request_failed(report: dict[str, Any]) -> None:
    assert [one.get("failed", 0) for one in report["loads"]] == [0] * len(report["loads"])
