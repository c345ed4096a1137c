# SPDX-License-Identifier: Apache-2.0
"""How many workers a training gets, how often they are started again, and what is said after."""

from collections import Counter
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from sg4v_ray.core.errors import ConfigError, WeightsError, WorkersLost
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.recipes.sharegpt4v import align
from sg4v_ray.training import launch

pytestmark = pytest.mark.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_workers": 0}, "train_workers must be at least 1, got 0"),
        (
            {"min_train_workers": 3},
            "min_train_workers is 3; it must be .* at most train_workers, 2",
        ),
        ({"min_train_workers": 0}, "min_train_workers is 0; it must be at least 1"),
        ({"max_restarts": -1}, "max_restarts must be 0 or more, got -1"),
    ],
)
def test_workers_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Where(root="/runs", **settings)


def _cluster(
    patch: pytest.MonkeyPatch, *nodes: dict[str, float], most: dict[str, float] | None = None
) -> None:
    """Let the cluster have some nodes, and grow to `most`."""
    now: Counter[str] = Counter()
    for one in nodes:
        now.update(one)  # type: ignore[arg-type]
    patch.setattr(launch.ray, "cluster_resources", lambda: dict(now))
    patch.setattr(launch.ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
    patch.setattr(launch, "max_cluster_resources", lambda: most or dict(now))


def test_a_worker_needs_its_cpus_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, {"CPU": 6.0}, {"CPU": 6.0})
    launch._check_cluster(Where(root="/runs", train_workers=2, worker_cpus=4))
    with pytest.raises(ConfigError, match="on 2 nodes, room for 2 of 3"):
        launch._check_cluster(Where(root="/runs", train_workers=3, worker_cpus=4))


def test_a_cluster_that_may_grow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, {"CPU": 8.0}, most={"CPU": 8.0, "GPU": 16.0})
    launch._check_cluster(Where(root="/runs", train_workers=8, train_gpu=True))
    with pytest.raises(ConfigError, match="room for 8 of 9"):
        launch._check_cluster(Where(root="/runs", train_workers=9, train_gpu=True))


def test_workers_that_would_compute_nothing_are_named_with_what_keeps_them_busy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launch._warn_of_idle_workers(align(), 16)  # 256 samples in micro-batches of 32
    assert "50% of the work of 16 workers" in caplog.text
    assert "--config.micro-batch 16 keeps all busy" in caplog.text
    caplog.clear()
    launch._warn_of_idle_workers(align(), 8)
    assert not caplog.text


def test_the_cluster_must_hold_the_fewest_workers_and_not_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _cluster(monkeypatch, {"CPU": 2.0})
    launch._check_cluster(Where(root="/runs", train_workers=8, min_train_workers=2))
    for fewest in (None, 3):
        with pytest.raises(ConfigError, match=f"room for 2 of {fewest or 8} training workers"):
            launch._check_cluster(Where(root="/runs", train_workers=8, min_train_workers=fewest))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        pytest.param(
            WorkerGroupError("all of it", {1: OSError("the node is gone")}),
            "times, the last time rank 1 with OSError: the node is gone\nnothing was saved",
            id="a worker",
        ),
        pytest.param(
            ControllerError(OSError("no room")),
            "(?s)Ray Train gave up: .*no room\n.* run the same",
            id="Ray Train",
        ),
        pytest.param(
            OutOfMemoryError("the node runs low on memory"),
            "Ray Train gave up: the node runs low on memory",
            id="its controller",
        ),
    ],
)
def test_workers_that_failed_too_often_are_an_error_that_says_what_to_do(
    tmp_path: Path, failure: TrainingFailedError | RayError, message: str
) -> None:
    why = launch._why(failure, Storage(str(tmp_path)), Where(root="/runs"))
    assert isinstance(why, WorkersLost)
    with pytest.raises(WorkersLost, match=message):
        raise why


def test_an_error_of_ours_in_a_worker_is_that_of_the_run(tmp_path: Path) -> None:
    ours = WeightsError("no key lm_head.weight")
    failure = WorkerGroupError("all of it", {0: OSError("connection reset"), 1: ours})
    assert launch._why(failure, Storage(str(tmp_path)), Where(root="/runs")) is ours
