# SPDX-License-Identifier: Apache-2.0
"""Placement: where a job runs and how much it may take.

Never part of an artifact's identity: a resume may change any of it.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import Storage, check_root

TrackerKind = Literal["tensorboard", "wandb", "none"]
_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_UNITS_S: Final = (86_400, 3_600, 60, 1)


def seconds_of(text: str) -> int:
    """Read a duration such as `2d`, `6h30m` or `90s`.

    Raises:
        ConfigError: it is none, or zero.
    """
    match = _DURATION.fullmatch(text)
    parts = match.groups() if match else ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, _UNITS_S, strict=False))
    if seconds <= 0:
        raise ConfigError(f"{text!r} is no duration; write days, hours, minutes, seconds as 6h30m")
    return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Root of all artifacts, and the size of the machine to use."""

    root: str
    """Absolute path or URI below which artifacts lie."""
    min_actors: int = 1
    """Engine (or teacher) actors that captioning starts with."""
    max_actors: int = 1
    """Engine (or teacher) actors that captioning may grow to."""
    engine_cpus: float = 1.0
    """CPUs that one engine actor reserves."""
    engine_threads: int = 1
    """CPU threads of one engine. Ray's OMP_NUM_THREADS follows the reservation, so it is set."""
    engine_gpus: float = 0.0
    """GPUs that one engine actor reserves."""
    decode_cpus: float = 0.5
    """CPUs that a task reserves which fetches and decodes images. 1 where photographs are large
    and CPUs are many; less where slow storage is waited for."""
    train_workers: int = 2
    """Training processes, one a GPU where there are GPUs."""
    min_train_workers: int | None = None
    """For machines that come and go: go on from the last checkpoint with as few as these when
    nodes are lost, and grow to `train_workers` again when there is room. None waits for a node in
    place of the lost one. Batches and their order do not change with the number of workers, but
    sums are taken in another order: losses and weights are then those of an undisturbed run within
    the tolerance of floats, not to the bit."""
    max_restarts: int = 3
    """How often one call of training starts again after workers failed. Machines that are taken
    back with notice, and growing, are not counted."""
    train_gpu: bool = False
    """Give every training process a GPU."""
    worker_cpus: float = 1.0
    """CPUs that one training process reserves; it computes with as many threads, at least 1."""
    loader_processes: int = 0
    """Processes of a training process that read and decode what it trains on: 4 a GPU, as
    published; count them in `worker_cpus`. 0 decodes in threads of the training process: right
    where CPUs compute, but on GPUs these take turns with the thread that launches kernels."""
    step_deadline: str = "30m"
    """How long one training step may take. After that a process waits for another that is gone:
    it writes where it stands, ends, and Ray starts all from the last checkpoint."""
    tracker: TrackerKind = "tensorboard"
    """Where a training run's curves go: TensorBoard files in the model's artifact, or Weights &
    Biases (WANDB_API_KEY, WANDB_MODE and the like in the environment of the workers)."""
    finish_by: str | None = None
    """Time budget of captioning from its start, e.g. `6h30m`. The throughput of the first 64 rows
    per actor is measured; then the pool gets the size that meets it, `max_actors` at most."""
    gpu_hour_usd: float | None = None
    """What one GPU costs an hour; tells dollars so far and expected."""
    max_usd: float | None = None
    """Captioning stops, resumable, before it has spent more. Needs `gpu_hour_usd`."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        check_root(self.root)
        if not 1 <= self.min_actors <= self.max_actors:
            raise ConfigError(
                "actors must satisfy 1 <= min_actors <= max_actors, got "
                f"{self.min_actors} and {self.max_actors}"
            )
        self._check_training()
        seconds_of(self.step_deadline)
        if self.finish_by is not None:
            seconds_of(self.finish_by)
        for name in ("gpu_hour_usd", "max_usd"):
            if (price := getattr(self, name)) is not None and price <= 0:
                raise ConfigError(f"{name} must be above 0, got {price}")
        if self.max_usd is not None and (self.gpu_hour_usd is None or not self.engine_gpus):
            raise ConfigError(
                f"max_usd is {self.max_usd:g}, but without gpu_hour_usd and engine_gpus above 0 "
                "nothing costs anything; give all three"
            )
        for name in ("engine_cpus", "decode_cpus", "worker_cpus"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")

    def _check_training(self) -> None:
        if self.train_workers < 1:
            raise ConfigError(f"train_workers must be at least 1, got {self.train_workers}")
        least = self.min_train_workers
        if least is not None and not 1 <= least <= self.train_workers:
            raise ConfigError(
                f"min_train_workers is {least}; it must be at least 1 and at most train_workers, "
                f"{self.train_workers}"
            )
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts must be 0 or more, got {self.max_restarts}")
        if self.loader_processes < 0:
            raise ConfigError(
                f"loader_processes must be at least 0, got {self.loader_processes}; 0 decodes in "
                "threads of the training process"
            )

    @property
    def storage(self) -> Storage:
        """The storage of the root."""
        return Storage(self.root)
