# SPDX-License-Identifier: Apache-2.0
"""Where the curves of a run go: TensorBoard files beside the model, or Weights & Biases."""

import dataclasses
import importlib.util
import logging
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage, is_local, local_path
from sg4v_ray.core.where import TrackerKind
from sg4v_ray.training.metrics import Metrics

FOLDER: Final = "tensorboard"
PROJECT: Final = "sg4v-ray"
"""Of Weights & Biases, unless WANDB_PROJECT names another."""
_UPLOAD_EVERY_S: Final = 60.0
_ID_FILE: Final = "wandb-id"
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Draws curves over steps. Rank 0 has one."""

    def log(self, metrics: Metrics) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Write what is left."""


def check(kind: TrackerKind) -> None:
    """Raise ConfigError if a tracker's package is not installed."""
    if kind == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "tracker is wandb, which is not installed; pip install wandb, or set --where.tracker "
            "tensorboard"
        )


def open_tracker(
    kind: TrackerKind, home: Storage, *, name: str, settings: Mapping[str, Any]
) -> Tracker:
    """Return the tracker of a run; one that was stopped is gone on with.

    Args:
        kind: which.
        home: storage of the artifact.
        name: of the artifact.
        settings: what the run is, shown beside its curves.
    """
    if kind == "tensorboard":
        return _TensorBoard(home)
    return _WandB(home, name, settings) if kind == "wandb" else _Nothing()


def values(metrics: Metrics) -> dict[str, float]:
    """Return what can be drawn, by the name of its curve."""
    named = dataclasses.asdict(metrics)
    del named["step"], named["total_steps"]
    return {f"train/{name}": value for name, value in named.items() if value is not None}


class _Nothing:
    def log(self, metrics: Metrics) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    """One event file for each start. A bucket gets the file whole, now and then."""

    def __init__(self, home: Storage) -> None:
        self._home, self._is_local = home, is_local(home.root)
        self._temporary = tempfile.TemporaryDirectory(prefix="sg4v-tensorboard-")
        place = local_path(home.uri(FOLDER)) if self._is_local else Path(self._temporary.name)
        self._place = str(place)
        self._writer: Any = None
        self._uploaded = time.monotonic()

    def log(self, metrics: Metrics) -> None:
        try:
            self._draw(metrics)
        except STORAGE_ERRORS as error:  # no reason to stop training
            _log.warning("curves are not written at step %d: %s", metrics.step, error)

    def _draw(self, metrics: Metrics) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Steps after a checkpoint that a stopped run drew are not drawn twice.
            self._writer = SummaryWriter(self._place, purge_step=metrics.step)
        for name, value in values(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()
        if time.monotonic() - self._uploaded >= _UPLOAD_EVERY_S:
            self._upload()

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
                self._upload()
        except STORAGE_ERRORS as error:
            _log.warning("the last curves are not written: %s", error)
        self._temporary.cleanup()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        if not self._is_local:
            self._home.upload(Path(self._place), FOLDER)


def _id_of(home: Storage) -> str:
    """Return the id of an artifact's run: the same after a stop, another if it is made anew."""
    home.create(_ID_FILE, uuid.uuid4().hex.encode())
    return home.get(_ID_FILE).decode()


class _WandB:
    """Key, project and mode are W&B's own environment variables, on the workers' node."""

    def __init__(self, home: Storage, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            name=name,
            id=_id_of(home),
            resume="allow",
            config=dict(settings),
        )

    def log(self, metrics: Metrics) -> None:
        self._run.log(values(metrics), step=metrics.step)

    def close(self) -> None:
        self._run.finish()
