# SPDX-License-Identifier: Apache-2.0
"""Placement: where a job runs and how much it may take.

Never part of an artifact's identity: a resume may change any of it.
"""

from dataclasses import dataclass

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import Storage, check_root


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
    train_workers: int = 2
    """Training processes, one a GPU where there are GPUs."""
    train_gpu: bool = False
    """Give every training process a GPU."""
    worker_cpus: float = 1.0
    """CPUs that one training process reserves; it computes with as many threads, at least 1."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        check_root(self.root)
        if not 1 <= self.min_actors <= self.max_actors:
            raise ConfigError(
                "actors must satisfy 1 <= min_actors <= max_actors, got "
                f"{self.min_actors} and {self.max_actors}"
            )
        if self.train_workers < 1:
            raise ConfigError(f"train_workers must be at least 1, got {self.train_workers}")
        for name in ("engine_cpus", "worker_cpus"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def storage(self) -> Storage:
        """The storage of the root."""
        return Storage(self.root)
