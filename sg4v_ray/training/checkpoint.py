# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: `checkpoints/<step>-<random>/`, complete exactly with `complete.json`.

DeepSpeed's files are pickles, so they lie under our own root only, and their checksums are
verified before they are opened. Each rank writes and reads its own files by way of a local folder
(`TMPDIR` says where), so a bucket serves as well as a disk.
"""

import dataclasses
import json
import logging
import re
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch.distributed as dist

from sg4v_ray.core.config import load as load_config
from sg4v_ray.core.errors import ConfigError, StorageError
from sg4v_ray.core.storage import Storage

T = TypeVar("T")
_log = logging.getLogger(__name__)

FOLDER: Final = "checkpoints"
_COMPLETE: Final = "complete.json"
_KEEP: Final = 2
"""Should the newest turn out damaged, a person may delete it and resume from the one before."""
_RANK_FILE: Final = re.compile(r"_pp_rank_(\d+)_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is: with the plan, all of its state that is not DeepSpeed's."""

    step: int = 0
    """Optimizer steps done; the plan gives epoch and position from it."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples, tokens, labels, rejected rows by reason, over all ranks since step 0."""
    losses: tuple[float, ...] = ()
    """Loss of each step."""
    grad_norms: tuple[float, ...] = ()
    """Gradient norm of each step, before clipping."""
    resumed_at: tuple[int, ...] = ()
    """Steps at which a run took over from one that was stopped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What `complete.json` holds."""

    name: str
    world_size: int
    progress: Progress
    digests: dict[str, str]
    """sha256 by file name, of the files of all ranks."""

    def of_rank(self, rank: int) -> dict[str, str]:
        """Return the digests of the files that one rank opens: its own, and those of no rank."""
        found = {name: _RANK_FILE.search(name) for name in self.digests}
        return {
            name: self.digests[name]
            for name, match in found.items()
            if match is None or int(match[1]) == rank
        }


def save(home: Storage, engine: Any, progress: Progress) -> None:
    """Write a checkpoint and drop those before the last two. All ranks call this together.

    Args:
        home: storage of the artifact.
        engine: DeepSpeed's.
        progress: equal on all ranks.
    """
    name = _from_first(lambda: f"{progress.step:08d}-{uuid.uuid4().hex[:8]}")
    path = f"{FOLDER}/{name}"
    with tempfile.TemporaryDirectory(prefix="sg4v-checkpoint-") as staging:
        (Path(staging) / name).mkdir()
        engine.save_checkpoint(staging, tag=name, save_latest=False)
        written = home.upload(Path(staging) / name, path)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, written)
    if dist.get_rank() == 0:
        record = Checkpoint(
            name=name,
            world_size=dist.get_world_size(),
            progress=progress,
            digests={file: digest for one in gathered for file, digest in one.items()},
        )
        home.put(f"{path}/{_COMPLETE}", json.dumps(dataclasses.asdict(record)).encode())
        _prune(home)
    dist.barrier()


def newest(home: Storage) -> Checkpoint | None:
    """Return the newest complete checkpoint of an artifact."""
    complete = [path for path in home.list(FOLDER) if path.endswith(f"/{_COMPLETE}")]
    if not complete:
        return None
    return load_config(Checkpoint, json.loads(home.get(complete[-1])))


def check_world_size(checkpoint: Checkpoint, world_size: int) -> None:
    """Raise ConfigError unless a checkpoint is of as many workers as there are now."""
    if checkpoint.world_size != world_size:
        raise ConfigError(
            f"checkpoint {checkpoint.name} holds the optimizer state of {checkpoint.world_size} "
            f"workers and cannot be shared by {world_size}; resume with train_workers="
            f"{checkpoint.world_size}"
        )


def resume(home: Storage, engine: Any) -> Progress:
    """Put DeepSpeed into the newest state, if there is one. All ranks call this together.

    Raises:
        ConfigError: it was written by another number of workers.
        StorageError: a file is not the one that was written.
    """
    checkpoint: Checkpoint | None = _from_first(lambda: newest(home))
    if checkpoint is None:
        return Progress()
    check_world_size(checkpoint, dist.get_world_size())
    path = f"{FOLDER}/{checkpoint.name}"
    with tempfile.TemporaryDirectory(prefix="sg4v-checkpoint-") as cache:
        try:
            digests = checkpoint.of_rank(dist.get_rank())
            folder = home.localise(path, cache=Path(cache), digests=digests)
        except StorageError as error:
            raise StorageError(
                f"{error}; delete {home.uri(path)} to resume from the checkpoint before it"
            ) from error
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    _log.info("resumed from checkpoint %s", checkpoint.name)
    return dataclasses.replace(
        checkpoint.progress, resumed_at=(*checkpoint.progress.resumed_at, checkpoint.progress.step)
    )


def _prune(home: Storage) -> None:
    """Delete all checkpoints but the last complete ones, unfinished ones of dead runs too."""
    paths = list(home.list(FOLDER))
    complete = [path.split("/")[1] for path in paths if path.endswith(f"/{_COMPLETE}")]
    for name in sorted({path.split("/")[1] for path in paths} - set(complete[-_KEEP:])):
        home.delete(f"{FOLDER}/{name}")


def _from_first(make: Callable[[], T]) -> T:
    """Call a function on rank 0 only and return its result on every rank."""
    box: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])
