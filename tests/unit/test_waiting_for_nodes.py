# SPDX-License-Identifier: Apache-2.0
"""A job that joins a cluster waits for nodes that start; one that starts Ray itself does not."""

from collections.abc import Callable

import pytest

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.exactly_once import capacity
from sg4v_ray.exactly_once.capacity import wait_for_nodes


@pytest.fixture(autouse=True)
def outside_of_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setattr(capacity, "_POLL_S", 0.0)


def too_small(times: int) -> Callable[[], str | None]:
    """Return a check that fails some times and then passes."""
    answers = iter(["the cluster has 0 CPUs"] * times)
    return lambda: next(answers, None)


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"])
def test_a_cluster_that_starts_is_waited_for(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "10.0.0.1:6379")
    wait_for_nodes(too_small(3))
    assert caplog.messages == ["waiting up to 60 s for nodes that start: the cluster has 0 CPUs"]


def test_a_cluster_that_stays_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="has 0 CPUs"):
        wait_for_nodes(lambda: "the cluster has 0 CPUs", wait_s=0.0)


def test_a_machine_that_is_too_small_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match="has 0 CPUs"):
        wait_for_nodes(too_small(1))
