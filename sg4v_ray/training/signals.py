# SPDX-License-Identifier: Apache-2.0
"""What a signal to the driver asks of all training processes, on any node.

SIGUSR1: save a checkpoint now and go on. SIGTERM, which `ray job stop` and Kubernetes send: save
now, then stop; a second SIGTERM ends the driver at once. Both kill soon afterwards: give them more
time than a step and a checkpoint take, `terminationGracePeriodSeconds` (30 s) of the pod, or
`ray job submit --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}'` (3 s).

A wish is an object below the run: rank 0 sees it wherever it runs, also after a restart, and no
further process can be lost. A thread looks, so that no step waits for a bucket. All ranks hear of
it with the counts of the next step, so they obey before the same one.
"""

import logging
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Final, Self

from sg4v_ray.core.errors import Stopped
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage

_log = logging.getLogger(__name__)

FOLDER: Final = "signals"
BEGUN: Final = "begun"
"""Rank 0 is in the loop and looks for wishes."""
SAVE: Final = "save"
_STOP: Final = "stop"
LOOK_EVERY_S: Final = 1.0
_IDLE: Final = (
    "stopped while no worker trained; checkpoints of earlier steps are kept, run the same command "
    "to go on"
)


class Word(IntEnum):
    """What is asked of a run; a number, so that it travels in an all-reduce."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


def wishes(home: Storage, attempt: int) -> Storage:
    """Return where the driver with this number of the lease says what it wishes."""
    return home.sub(f"{FOLDER}/{attempt:06d}")


class Inbox:
    """Rank 0's ear. It listens from the first `take` to the end of its `with` block."""

    def __init__(self, wishes: Storage) -> None:
        self._wishes = wishes
        self._words: queue.SimpleQueue[Word] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is None:
            return
        self._thread.join()
        try:
            self._wishes.delete(BEGUN)
        except STORAGE_ERRORS as error:
            _log.warning("a signal may wait for a loop that has ended: %s", error)

    def take(self) -> Word:
        """Return the next word, if there is one; never waits."""
        if self._thread.ident is None:
            self._thread.start()
        try:
            return self._words.get_nowait()
        except queue.Empty:
            return Word.NOTHING

    def _listen(self) -> None:
        has_begun, pause_s = False, 0.0
        while not self._ended.wait(pause_s):
            pause_s = LOOK_EVERY_S
            try:
                if not has_begun:
                    self._wishes.put(BEGUN, b"")
                    has_begun = True
                if self._wishes.exists(SAVE):
                    self._wishes.delete(SAVE)
                    self._words.put(Word.SAVE)
                if self._wishes.exists(_STOP):  # stays: the next worker must see it if this dies
                    self._words.put(Word.STOP)
                    return
            except STORAGE_ERRORS as error:
                _log.warning("signals to the driver may come late: %s", error)


class Receiver:
    """The driver's side: takes signals, and passes them on while workers train."""

    def __init__(self) -> None:
        self._wishes: Storage | None = None
        self._was_told_to_stop, self._gives_up = False, False

    @contextmanager
    def receiving(self) -> Iterator[Self]:
        """Take SIGUSR1 and SIGTERM for the length of a `with` block, if Python lets this thread.

        Raises:
            Stopped: SIGTERM came while no worker trained; after that the workers say so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        before = signal.signal(signal.SIGUSR1, self._save)
        signal.signal(signal.SIGTERM, self._stop)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, self._before)
            signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)

    @contextmanager
    def passing_on(self, wishes: Storage) -> Iterator[None]:
        """Pass signals on to the workers of Ray Train, which runs inside the `with` block.

        Ray Train takes Ctrl-C: it removes the workers, ends the driver without a word, and never
        gives the signal back. Here it ends as Ctrl-C does elsewhere, and is given back.

        Raises:
            Stopped: SIGTERM came before a worker trained.
            KeyboardInterrupt: Ctrl-C.
            SystemExit: a second SIGTERM.
        """
        before = signal.getsignal(signal.SIGINT)
        self._wishes = wishes
        try:
            yield
        except (SystemExit, KeyboardInterrupt) as end:
            if self._gives_up:
                raise Stopped(_IDLE) from end
            if self._was_told_to_stop:
                raise
            raise KeyboardInterrupt from end
        finally:
            self._wishes = None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before or signal.SIG_DFL)

    def refuse_to_go_on(self, what: str) -> None:
        """Raise Stopped if SIGTERM came when it was too late to stop what is finished now."""
        if self._was_told_to_stop:
            raise Stopped(f"{what} is finished; nothing after it was begun, run the same to go on")

    def _save(self, signum: int, frame: FrameType | None) -> None:
        if self._wishes is None:
            _log.warning("SIGUSR1 came while no worker trained: there is nothing to save")
            return
        try:
            self._wishes.put(SAVE, b"")
            _log.info("SIGUSR1: workers save and go on")
        except STORAGE_ERRORS as error:
            _log.warning("SIGUSR1 was not passed on to the workers, send it again: %s", error)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, self._before)
        self._was_told_to_stop = True
        if self._wishes is None:
            raise Stopped(_IDLE)
        try:
            if self._wishes.exists(BEGUN):
                self._wishes.put(_STOP, b"")
                _log.info("SIGTERM: workers save and stop; a second one ends this at once")
                return
        except STORAGE_ERRORS as error:
            _log.warning("SIGTERM was not passed on to the workers, it ends them: %s", error)
        self._gives_up = True
        if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, None):
            raise Stopped(_IDLE)  # Ray Train does not run yet; with nohup nobody hears SIGINT
        signal.raise_signal(signal.SIGINT)
