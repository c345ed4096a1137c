# SPDX-License-Identifier: Apache-2.0
"""What the driver's Ray Train is told to do when it resizes a group of workers: save first.

Ray Train ends a healthy group without a word when there is room for a larger one. The hooks here
are Ray's own and not public; `ray.train.UserCallback` hears of reports and errors only.
"""

import logging
import threading
import time
from typing import Any, Final

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from sg4v_ray.core.storage import STORAGE_ERRORS, Storage
from sg4v_ray.training import checkpoint
from sg4v_ray.training.signals import BEGUN, LOOK_EVERY_S, SAVE, wishes

_log = logging.getLogger(__name__)
_RESIZE_WAIT_S: Final = 180.0
"""How long a resize waits for its checkpoint. Ray's controller sees nothing else meanwhile."""


class Groups(ControllerCallback, WorkerGroupCallback):
    """Follows the groups of workers of a run; lives in Ray Train's controller."""

    def __init__(self, home: Storage, attempt: int) -> None:
        self._home, self._wishes = home, wishes(home, attempt)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Forget that the group before was in the loop."""
        try:
            self._wishes.delete(BEGUN)
        except STORAGE_ERRORS as error:
            _log.warning("a signal may wait for workers that are gone: %s", error)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Let the workers save before a resize ends them."""
        if not isinstance(current_state, ResizingState):
            return
        try:
            if self._wishes.exists(BEGUN):
                self._save()
        except STORAGE_ERRORS as error:
            _log.warning("resized without a checkpoint, older ones are used: %s", error)

    def _save(self) -> None:
        before, pause = _newest(self._home), threading.Event()
        self._wishes.put(SAVE, b"")
        deadline = time.monotonic() + _RESIZE_WAIT_S
        while _newest(self._home) == before and self._wishes.exists(BEGUN):
            if time.monotonic() > deadline:
                _log.warning("no checkpoint in %g s; resized without", _RESIZE_WAIT_S)
                return
            pause.wait(LOOK_EVERY_S)


def _newest(home: Storage) -> str | None:
    found = checkpoint.newest(home)
    return found.name if found else None
