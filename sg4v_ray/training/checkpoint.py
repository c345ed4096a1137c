# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: `checkpoints/<step>-<random>/`, complete exactly with `complete.json`.

Each rank writes the pieces that it holds (`training.fragments`) as safetensors, from a copy, while
training goes on; `complete.json` follows when all have. Any number of workers under any ZeRO stage
reads what any other wrote: a rank opens the files that hold its pieces, and of those only its part.
What does not train is not in it: it comes from the artifact that the run starts from.
"""

import dataclasses
import json
import logging
import math
import tempfile
import uuid
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sg4v_ray.core.config import load as load_config
from sg4v_ray.core.errors import ConfigError, Sg4vError, StorageError
from sg4v_ray.core.lease import refuse_overtaken
from sg4v_ray.core.storage import Storage, is_local, local_path, sha256_of
from sg4v_ray.training.fragments import KINDS, Piece, inner_optimizer, is_whole, pieces, restore
from sg4v_ray.training.progress import Progress
from sg4v_ray.training.ranks import from_first, gather
from sg4v_ray.training.room import check_room

State: TypeAlias = dict[tuple[str, str], Tensor]
"""(numel,) by kind and parameter name."""
_log = logging.getLogger(__name__)

FOLDER: Final = "checkpoints"
_COMPLETE: Final = "complete.json"
KEEP: Final = 2
"""The newest may turn out damaged: then the one before it is used."""


class CheckpointsDamaged(Sg4vError):
    """There are checkpoints, and none can be read: days of work may be in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Where a part of a parameter lies."""

    file: str
    start: int
    numel: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What `complete.json` holds."""

    name: str
    progress: Progress
    digests: dict[str, str]
    """sha256 by file name, of the files of all ranks."""
    parts: dict[str, tuple[Part, ...]]
    """By parameter name."""


class Checkpoints:
    """The checkpoints of one run, on one rank. All ranks call its methods together."""

    def __init__(self, home: Storage, engine: Any, *, attempt: int) -> None:
        """Look where DeepSpeed keeps its state; `attempt` is the number of the driver's lease."""
        self._attempt = attempt
        self._home, self._engine = home, engine
        self._pieces = pieces(engine)
        self._pool = ThreadPoolExecutor(1, "sg4v-checkpoint")
        self._writing: tuple[str, Progress, Future[dict[str, str]]] | None = None
        self.last_step = 0
        """Of what was begun or resumed last."""

    @property
    def is_written(self) -> bool:
        """Say whether this rank has written its part of what was begun; only then `finish` waits
        for no upload.
        """
        return self._writing is not None and self._writing[2].done()

    def begin(self, progress: Progress) -> None:
        """Copy the state and write it in the background, after what was begun before.

        Raises:
            StorageError: the one before could not be written, or there is no room for this one.
        """
        self.finish()
        name = from_first(lambda: f"{progress.step:08d}-{uuid.uuid4().hex[:8]}")
        optimizer = inner_optimizer(self._engine)
        writes = dist.get_rank() == 0 or not is_whole(self._engine)
        copies = {
            f"{kind}/{piece.name}": piece.read(optimizer, kind).to("cpu", copy=True)
            for piece in self._pieces
            for kind in KINDS
            if writes
        }
        if not is_local(self._home.root):
            check_room(sum(one.nbytes for one in copies.values()))
        written = self._pool.submit(self._write, f"{FOLDER}/{name}", copies)
        self._writing = (name, progress, written)
        self.last_step = progress.step

    def _write(self, path: str, copies: dict[str, Tensor]) -> dict[str, str]:
        if not copies:
            return {}
        name = _file_of(dist.get_rank())
        try:
            if is_local(self._home.root):  # nobody reads it before its record is there
                file = local_path(self._home.uri(f"{path}/{name}"))
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file(copies, file)
                return {name: sha256_of(file)}
            with tempfile.TemporaryDirectory(prefix="sg4v-checkpoint-") as folder:
                save_file(copies, Path(folder, name))
                return self._home.upload(Path(folder), path)
        except (OSError, SafetensorError) as error:
            size = sum(one.nbytes for one in copies.values()) / 1e9
            raise StorageError(
                f"a checkpoint's part of {size:.1f} GB could not be written ({error}); make room, "
                "or set TMPDIR to a disk with more"
            ) from error

    def finish(self) -> None:
        """Wait until all ranks have written what was begun, and complete it."""
        if self._writing is None:
            return
        (name, progress, written), self._writing = self._writing, None
        gathered = gather((written.result(), self._my_parts() if written.result() else {}))
        parts: dict[str, list[Part]] = defaultdict(list)
        for _, held in gathered:
            for parameter, part in held.items():
                parts[parameter].append(part)
        for piece in self._pieces:  # on every rank, so that all end here together
            found = sum(one.numel for one in parts[piece.name])
            if found != piece.size:
                raise StorageError(
                    f"checkpoint {name} has {found} of {piece.size} numbers of {piece.name}, so "
                    "it is not completed; install the locked version of DeepSpeed"
                )
        if dist.get_rank() == 0:
            refuse_overtaken(self._home, self._attempt)  # else it would delete the other's
            record = Checkpoint(
                name=name,
                progress=progress,
                digests={file: digest for files, _ in gathered for file, digest in files.items()},
                parts={parameter: tuple(found) for parameter, found in parts.items()},
            )
            data = json.dumps(dataclasses.asdict(record)).encode()
            self._home.put(f"{FOLDER}/{name}/{_COMPLETE}", data)
            _prune(self._home)
        dist.barrier()

    def _my_parts(self) -> dict[str, Part]:
        file = _file_of(dist.get_rank())
        return {
            piece.name: Part(file=file, start=piece.start, numel=piece.numel)
            for piece in self._pieces
        }

    def resume(self) -> Progress:
        """Put the newest sound state into DeepSpeed; return how far it is, or nothing done.

        Raises:
            CheckpointsDamaged: there are some, and none can be read.
        """
        restored = self.restore()
        if restored is None:
            return Progress()
        resumed = (*restored.resumed_at, restored.step)
        return dataclasses.replace(restored, resumed_at=resumed)

    def restore(self, *, skip: int = 0, among: int | None = None) -> Progress | None:
        """Put the newest sound state, or an earlier one, into DeepSpeed, if there is one.

        One with a file that is missing or not as it was written is passed over with a warning, and
        will not count among those that are kept.

        Args:
            skip: complete checkpoints to pass over.
            among: look at so many of the newest alone, the passed over included.

        Raises:
            CheckpointsDamaged: there are some, and none can be read.
        """
        damaged: list[str] = []
        for name in from_first(lambda: _complete(self._home))[skip:among]:
            state, record, problem = self._try_to_read(name)
            problems = [one for one in gather(problem) if one is not None]
            if problems or record is None:
                if dist.get_rank() == 0:
                    _log.warning(
                        "checkpoint %s is skipped, the one before is used: %s", name, problems[0]
                    )
                damaged.append(f"{name}: {problems[0]}" if problems else name)
                continue
            if dist.get_rank() == 0:
                for one in damaged:
                    _retire(self._home, one.split(":")[0])
            restore(self._engine, self._pieces, state, record.progress.updates)
            _log.info("checkpoint %s is read", name)
            self.last_step = record.progress.step
            return record.progress
        if damaged:
            raise CheckpointsDamaged(
                f"all {len(damaged)} checkpoints in {self._home.uri(FOLDER)} are damaged "
                f"({damaged[0]}); restore one from a copy, or delete that folder to train from the "
                "beginning"
            )
        return None

    def restore_step(self, step: int) -> None:
        """Put the state of a step that was saved into DeepSpeed.

        Raises:
            CheckpointsDamaged: its checkpoint is gone or not as it was written.
        """
        start, names = f"{step:08d}", from_first(lambda: _complete(self._home))
        name = next((one for one in names if one.startswith(start)), start)
        state, record, problem = self._try_to_read(name)
        problems = [one for one in gather(problem) if one is not None]
        if problems or record is None:
            raise CheckpointsDamaged(
                f"the best checkpoint, of step {step}, cannot be read ({problems[0]}); restore it "
                "from a copy, or train another version with export_checkpoint 'last'"
            )
        restore(self._engine, self._pieces, state, record.progress.updates)

    def _try_to_read(self, name: str) -> tuple[State, Checkpoint | None, str | None]:
        """Return the state and the record of a checkpoint, or what is wrong with it."""
        try:
            record = read(self._home, name)
            with tempfile.TemporaryDirectory(prefix="sg4v-checkpoint-") as cache:
                return self._read(record, Path(cache)), record, None
        except (StorageError, SafetensorError) as error:
            return {}, None, str(error)

    def _read(self, record: Checkpoint, cache: Path) -> State:
        """Read the parts of all files that make up this rank's pieces."""
        wanted: dict[str, list[tuple[Piece, Part]]] = defaultdict(list)
        for piece in self._pieces:
            for part in record.parts.get(piece.name, ()):
                if part.start < piece.start + piece.numel and piece.start < part.start + part.numel:
                    wanted[part.file].append((piece, part))
        digests = {file: record.digests[file] for file in wanted}
        folder = self._home.localise(f"{FOLDER}/{record.name}", cache=cache, digests=digests)
        state = {
            (kind, piece.name): torch.full((piece.numel,), torch.nan)
            for piece in self._pieces
            for kind in KINDS
        }
        for file, pairs in wanted.items():
            with safe_open(folder / file, framework="pt") as tensors:
                for piece, part in pairs:
                    for kind in KINDS:
                        _copy(tensors.get_slice(f"{kind}/{piece.name}"), part, piece, state, kind)
        self._check_covered(record, wanted)
        return state

    def _check_covered(
        self, record: Checkpoint, wanted: dict[str, list[tuple[Piece, Part]]]
    ) -> None:
        found: dict[str, int] = defaultdict(int)
        for pairs in wanted.values():
            for piece, part in pairs:
                start, stop = _overlap(piece, part)
                found[piece.name] += stop - start
        for piece in self._pieces:
            if found[piece.name] != piece.numel:
                raise StorageError(
                    f"checkpoint {record.name} has {found[piece.name]} of {piece.numel} numbers of "
                    f"{piece.name}"
                )


def _overlap(piece: Piece, part: Part) -> tuple[int, int]:
    """Return the range of the flattened parameter that both hold."""
    return max(piece.start, part.start), min(piece.start + piece.numel, part.start + part.numel)


def _copy(stored: Any, part: Part, piece: Piece, state: State, kind: str) -> None:
    start, stop = _overlap(piece, part)
    into = state[kind, piece.name][start - piece.start : stop - piece.start]
    into.copy_(stored[start - part.start : stop - part.start])


def newest(home: Storage) -> Checkpoint | None:
    """Return the newest complete checkpoint of an artifact."""
    names = _complete(home)
    return read(home, names[0]) if names else None


def read(home: Storage, name: str) -> Checkpoint:
    """Return what `complete.json` of a checkpoint holds.

    Raises:
        StorageError: it is not what this version writes.
    """
    path = f"{FOLDER}/{name}/{_COMPLETE}"
    try:
        return load_config(Checkpoint, json.loads(home.get(path)), finite=False)
    except (ValueError, ConfigError) as error:
        raise StorageError(
            f"{home.uri(path)} is no record of a checkpoint ({error}); delete its folder to resume "
            "from the checkpoint before it"
        ) from error


def _complete(home: Storage) -> list[str]:
    """Return the names of complete checkpoints, the newest first."""
    found = [path for path in home.list(FOLDER) if path.endswith(f"/{_COMPLETE}")]
    return sorted((path.split("/")[1] for path in found), reverse=True)


def _prune(home: Storage) -> None:
    """Delete all but the newest complete checkpoints and the best, unfinished ones too."""
    names = _complete(home)
    newest_of: dict[str, str] = {}
    for name in names:  # a step that was saved twice is one state to go back to
        newest_of.setdefault(name.split("-")[0], name)
    kept = set([*newest_of.values()][:KEEP]) | _best(home, names)
    for name in sorted({path.split("/")[1] for path in home.list(FOLDER)} - kept):
        home.delete(f"{FOLDER}/{name}")


def _retire(home: Storage, name: str) -> None:
    """Take a damaged checkpoint out of those that are complete; the next one removes it."""
    path = f"{FOLDER}/{name}"
    home.put(f"{path}/damaged.json", home.get(f"{path}/{_COMPLETE}"))
    home.delete(f"{path}/{_COMPLETE}")


def _best(home: Storage, names: list[str]) -> set[str]:
    """Return the checkpoint with the least held-out loss at its own step."""
    scored = {}
    for name in names:
        try:
            progress = read(home, name).progress
        except StorageError as error:
            _log.warning("%s", error)
            continue
        looks = progress.held_out
        if looks and looks[-1].step == progress.step and math.isfinite(looks[-1].loss):
            scored[name] = looks[-1].loss
    return {min(scored, key=scored.__getitem__)} if scored else set()


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
