# SPDX-License-Identifier: Apache-2.0
"""What a signal to a training driver does, without a cluster: the driver's side and rank 0's."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from sg4v_ray.core.errors import Stopped
from sg4v_ray.core.storage import Storage
from sg4v_ray.training import signals
from sg4v_ray.training.groups import Groups
from sg4v_ray.training.signals import Inbox, Receiver, Word, wishes

pytestmark = pytest.mark.training


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LOOK_EVERY_S", 0.01)


@pytest.fixture(params=["folder", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Where the driver of attempt 3 says what it wishes."""
    if request.param == "bucket":
        request.getfixturevalue("s3")
        return wishes(Storage(f"s3://sg4v-test/{tmp_path.name}"), 3)
    return wishes(Storage(str(tmp_path)), 3)


@pytest.fixture
def inbox(run: Storage) -> Iterator[Inbox]:
    with Inbox(run) as made:
        made.take()
        _until(run, signals.BEGUN)
        yield made


def _until(run: Storage, name: str) -> None:
    pause = threading.Event()
    while not run.exists(name):
        pause.wait(0.01)


def _next(inbox: Inbox) -> Word:
    pause = threading.Event()
    while (word := inbox.take()) is Word.NOTHING:
        pause.wait(0.01)
    return word


def test_each_sigusr1_reaches_the_worker_as_one_wish_to_save(run: Storage, inbox: Inbox) -> None:
    driver = Receiver()
    with driver.receiving(), driver.passing_on(run):
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
            assert _next(inbox) is Word.SAVE
            assert not run.exists(signals.SAVE)
            assert inbox.take() is Word.NOTHING


def test_sigterm_reaches_the_worker_and_the_one_that_follows_a_lost_worker(
    run: Storage, inbox: Inbox
) -> None:
    driver = Receiver()
    with driver.receiving(), driver.passing_on(run):
        signal.raise_signal(signal.SIGTERM)
        assert _next(inbox) is Word.STOP
        with Inbox(run) as next_worker:
            assert _next(next_worker) is Word.STOP


def test_the_signals_of_another_driver_are_not_for_this_run(run: Storage, inbox: Inbox) -> None:
    other = Storage(run.root.replace("000003", "000004"))
    other.put(signals.SAVE, b"")
    run.put(signals.SAVE, b"")
    assert _next(inbox) is Word.SAVE
    assert other.exists(signals.SAVE)


@pytest.mark.parametrize("sigint", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_ends_a_driver_whose_workers_do_not_train_yet(run: Storage, sigint: Any) -> None:
    before = signal.signal(signal.SIGINT, sigint)  # ignored: under nohup, or behind a shell's &
    driver = Receiver()
    try:
        with (
            driver.receiving(),
            pytest.raises(Stopped, match="no worker trained"),
            driver.passing_on(run),
        ):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_ends_a_driver_that_has_no_workers() -> None:
    with pytest.raises(Stopped, match="no worker trained"), Receiver().receiving():
        signal.raise_signal(signal.SIGTERM)


def test_sigusr1_without_workers_changes_nothing_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Receiver().receiving():
        signal.raise_signal(signal.SIGUSR1)
    assert "nothing to save" in caplog.text


def test_a_second_sigterm_ends_the_driver_as_if_nobody_had_listened(
    run: Storage, inbox: Inbox
) -> None:
    def usual(*_: object) -> None:
        raise SystemExit(1)

    before = signal.signal(signal.SIGTERM, usual)
    driver = Receiver()
    try:
        with pytest.raises(SystemExit), driver.receiving(), driver.passing_on(run):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is usual
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_that_ray_train_took_is_ctrl_c_again_and_is_given_back(run: Storage) -> None:
    before, driver = signal.getsignal(signal.SIGINT), Receiver()

    def as_ray_train_does(*_: object) -> None:
        raise SystemExit(1)

    with pytest.raises(KeyboardInterrupt), driver.receiving(), driver.passing_on(run):
        signal.signal(signal.SIGINT, as_ray_train_does)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_that_may_take_no_signals_trains_without_them(run: Storage) -> None:
    done, before = [], signal.getsignal(signal.SIGTERM)

    def train() -> None:
        driver = Receiver()
        with driver.receiving(), driver.passing_on(run):
            done.append(signal.getsignal(signal.SIGTERM) == before)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert done == [True]


def _resizing() -> ResizingState:
    return ResizingState(scaling_decision=ResizeDecision(num_workers=2, resources_per_worker={}))


def test_a_resize_asks_workers_that_train_for_a_checkpoint_and_waits_while_they_do(
    tmp_path: Path,
) -> None:
    home = Storage(str(tmp_path))
    with Inbox(wishes(home, 3)) as worker:
        worker.take()
        _until(wishes(home, 3), signals.BEGUN)
        resize = threading.Thread(
            target=Groups(home, 3).after_controller_state_update, args=(None, _resizing())
        )
        resize.start()
        assert _next(worker) is Word.SAVE
        assert resize.is_alive()
    resize.join()


def test_a_resize_of_workers_that_do_not_train_yet_waits_for_nothing(tmp_path: Path) -> None:
    home = Storage(str(tmp_path))
    groups = Groups(home, 3)
    wishes(home, 3).put(signals.BEGUN, b"")  # of the workers before
    groups.after_worker_group_start(None)
    groups.after_controller_state_update(None, _resizing())
    assert not wishes(home, 3).exists(signals.SAVE)


def test_sigterm_that_comes_too_late_to_stop_a_stage_stops_before_the_next(run: Storage) -> None:
    run.put(signals.BEGUN, b"")  # in its last step: nobody takes the wish any more
    driver = Receiver()
    with driver.receiving(), driver.passing_on(run):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped, match="vlm@v1 is finished; nothing after it was begun"):
        driver.refuse_to_go_on("vlm@v1")
    Receiver().refuse_to_go_on("vlm@v1")  # nobody said so
