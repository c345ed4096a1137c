# SPDX-License-Identifier: Apache-2.0
"""How many actors make a deadline, and what a job costs: arithmetic that a GPU bill hangs on."""

import pytest

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.where import seconds_of
from sg4v_ray.exactly_once.throughput import MARGIN, Throughput, dollars, expected_dollars


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("15m", 900),
        ("6h", 21_600),
        ("6h30m", 23_400),
        ("2d", 172_800),
        ("1d1s", 86_401),
    ],
)
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "0s", "1.5h", "30m6h", "-5m", "six hours"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="6h30m"):
        seconds_of(text)


def test_the_papers_1_2_million_images_in_a_day() -> None:
    """At 4.5 images a second and GPU (a conservative figure for 7B on vLLM), 1.2M in a day."""
    pace = Throughput(rows=4500, actor_s=1000)
    assert pace.actors_for(1_246_901, 86_400) == 4
    assert pace.seconds_for(1_246_901, 4) == pytest.approx(1_246_901 / 18)


def test_the_actors_asked_for_make_the_deadline_with_a_margin() -> None:
    pace = Throughput(rows=100, actor_s=10)
    needed = pace.actors_for(10_000, 60)
    assert needed is not None
    assert pace.seconds_for(10_000, needed) <= 60 / MARGIN
    assert pace.seconds_for(10_000, needed - 1) > 60 / MARGIN


def test_nothing_can_be_told_before_the_first_row_or_after_the_deadline() -> None:
    assert Throughput(rows=0, actor_s=100).actors_for(10, 60) is None
    assert Throughput(rows=0, actor_s=0).seconds_for(10, 2) is None
    assert Throughput(rows=10, actor_s=1).actors_for(10, 0) is None


def test_dollars_follow_gpu_hours() -> None:
    assert dollars(2 * 3600, 1.5) == 3.0
    assert expected_dollars(3.0, 100, 300) == 12.0
    assert expected_dollars(0.0, 0, 300) is None
