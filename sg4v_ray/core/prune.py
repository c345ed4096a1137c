# SPDX-License-Identifier: Apache-2.0
"""Leftover objects below a root, and their removal.

Only known kinds are found: row files that lost a race or were made again, attempts after the one
that can be resumed, indexes that were not used, `checkpoint-*/` of version 0.1, lease files of
ended writers, and staging files `NAME#<digits>` of local roots, which listings of obstore hide.
Nothing else is touched: no manifest or config, no model or digest, no report, no curve, no retry
that can be resumed, and nothing of the teacher's ledger.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sg4v_ray.core import lease
from sg4v_ray.core.artifact import CONFIG, FORMAT, Ref, find
from sg4v_ray.core.errors import ConfigError, LeaseHeld, LeaseLost
from sg4v_ray.core.lease import LeaseTiming
from sg4v_ray.core.rows import ROWS
from sg4v_ray.core.storage import Storage, is_local, local_path
from sg4v_ray.core.verify import (
    INDEX_FOLDER,
    digests_folder,
    manifest_names,
    reading,
    subfolders,
    used_indexes,
)

_log = logging.getLogger(__name__)

TEACHER_LEDGER: Final = "teacher-ledger"
"""Folder below a root that is never pruned: it records all paid requests."""
_STAGING: Final = re.compile(r".+#\d+")
_PART: Final = re.compile(r"part-(\d{6,})(?:\.r\d+)?\.parquet")
_RETRY: Final = re.compile(r"retry/attempt-(\d{4})/.*")
_CHECKPOINT: Final = re.compile(r"checkpoint-0\d{3}")
_PLAN: Final = "plan.json"
_MANIFEST_KEYS: Final = {"name", "version", "fingerprint", "config", "inputs", "counts"}
_AGAIN: Final = "superseded part"
_IN_USE_S: Final = 10.0
"""A staging file that was written to in this time belongs to a living writer without a lease, such
as an export."""
_UNFINISHED_S: Final = 3600.0
"""The same for artifacts without a manifest."""
_BATCH: Final = 1000
"""Objects that are deleted between two looks at the manifests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreferenced:
    """An object that no manifest refers to."""

    path: str
    """Relative to the root."""
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Artifact:
    """An artifact as its manifests describe it."""

    root: Storage
    ref: Ref
    manifests: dict[str, bytes]
    """All of them by name; empty if it is not finished."""
    files: set[str] = field(default_factory=set)
    """Row files and digests that a manifest lists."""
    attempts: set[str] = field(default_factory=set)
    unlisted: set[str] = field(default_factory=set)
    """Attempts whose files no manifest lists, as in format 1: they refer to whole folders."""

    @property
    def dir(self) -> Storage:
        """The folder of the artifact."""
        return self.root.sub(self.ref.path)

    @property
    def next_attempt(self) -> int:
        """Number of a retry that was started and is not committed."""
        return len(self.attempts) + 1


def find_unreferenced(
    storage: Storage, ref: Ref | None = None, *, timing: LeaseTiming | None = None
) -> list[Unreferenced]:
    """Return the removable objects of one artifact, or of all below a root; nothing is written.

    An artifact that a living writer holds is skipped with a warning. Of an artifact without a
    manifest only staging files are returned that are older than an hour.

    Raises:
        ArtifactMissing: there is no such artifact.
        ConfigError: `ref` is inside the teacher's ledger.
        StorageError: the root cannot be read.
    """
    timing = timing or LeaseTiming()
    with reading(storage.root):
        return [one for each in _artifacts(storage, ref) for one in _removable(each, timing)]


def prune(
    storage: Storage, ref: Ref | None = None, *, timing: LeaseTiming | None = None
) -> list[Unreferenced]:
    """Delete the objects that `find_unreferenced` returns, and return them.

    The lease of a finished artifact is held meanwhile, so that no job starts to write it.

    Raises:
        ArtifactMissing: there is no such artifact.
        ConfigError: `ref` is inside the teacher's ledger.
        LeaseLost: a manifest was added or changed meanwhile; nothing more was deleted.
    """
    timing, removed = timing or LeaseTiming(), []
    with reading(storage.root):
        for artifact in _artifacts(storage, ref):
            found = _removable(artifact, timing)
            paths = [one.path.removeprefix(f"{artifact.ref.path}/") for one in found]
            try:
                if paths and artifact.manifests:
                    _delete_under_lease(artifact, paths, timing)
                else:
                    _delete(artifact.dir, paths)
            except LeaseHeld as error:
                _log.warning("%s is skipped: %s", artifact.ref, error)
                continue
            removed += found
    return removed


def _artifacts(storage: Storage, ref: Ref | None) -> Iterator[_Artifact]:
    if ref is not None and ref.name == TEACHER_LEDGER:
        raise ConfigError(
            f"{ref} is inside the teacher's ledger, which records paid requests and is never "
            "pruned; name an artifact"
        )
    for one in _refs(storage) if ref is None else [ref]:
        artifact = _open(storage, one)
        if artifact is not None:
            yield artifact
        elif ref is not None:
            find(storage, ref)  # raises ArtifactMissing with advice


def _refs(storage: Storage) -> Iterator[Ref]:
    """Yield the address of each folder that may be an artifact."""
    for name in subfolders(storage):
        if name == TEACHER_LEDGER:
            continue
        for version in subfolders(storage.sub(name)):
            with suppress(ConfigError):  # not the name of an artifact
                yield Ref(name=name, version=version)


def _open(storage: Storage, ref: Ref) -> _Artifact | None:
    """Read the manifests of an artifact; None if a folder is no artifact or a newer one."""
    folder = storage.sub(ref.path)
    manifests = _manifests(storage, ref)
    if not manifests:
        started = folder.exists(CONFIG) or folder.list_folder("lease")
        return _Artifact(storage, ref, {}) if started else None
    artifact = _Artifact(storage, ref, manifests)
    for data in manifests.values():
        manifest = _parsed(data)
        if not manifest.keys() >= _MANIFEST_KEYS:
            return None
        if manifest.get("format", 1) > FORMAT:
            _log.warning("%s is skipped: a newer version of sg4v_ray wrote it", ref)
            return None
        prefix = digests_folder(manifest.get("digests", {}))
        artifact.files.update(f"{prefix}{one}" for one in manifest.get("digests", {}))
        artifact.files.update(one["path"] for one in manifest.get("files", ()))
        artifact.attempts.update(manifest.get("attempts", ()))
    artifact.unlisted.update(
        one
        for one in artifact.attempts
        if not any(file.startswith(f"{one}/") for file in artifact.files)
    )
    return artifact


def _parsed(data: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one for a `manifest.json` of other software."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _manifests(storage: Storage, ref: Ref) -> dict[str, bytes]:
    names = manifest_names(storage, ref)
    return {one: storage.get(f"{ref.path}/{one}") for one in names}


def _removable(artifact: _Artifact, timing: LeaseTiming) -> list[Unreferenced]:
    """Return what is removable of an artifact that no living writer holds."""
    if artifact.manifests:
        found = [
            *_rows(artifact),
            *_indexes(artifact),
            *_retries(artifact),
            *_checkpoints(artifact),
            *_lease_files(artifact.dir),
            *_staging(artifact, _IN_USE_S),
        ]
    else:
        found = list(_staging(artifact, _UNFINISHED_S))
    if found and not _is_free(artifact.dir, timing):
        _log.warning("%s is skipped: a job is writing it", artifact.ref)
        return []
    return [
        Unreferenced(path=f"{artifact.ref.path}/{path}", size_bytes=size, reason=reason)
        for path, size, reason in found
    ]


def _is_free(folder: Storage, timing: LeaseTiming) -> bool:
    """Return True if no living writer holds the lease of an artifact."""
    held = lease.claims(folder)
    return not held or lease.may_follow(folder, held[-1], timing)


_Found = Iterator[tuple[str, int, str]]
"""Path relative to the artifact, size in bytes, and reason."""


def _rows(artifact: _Artifact) -> _Found:
    """Yield row files that no manifest lists, and plans of attempts that no manifest has."""
    resumable = f"{ROWS}/attempt-{artifact.next_attempt:04d}"
    whole = tuple(f"{one}/" for one in (*artifact.unlisted, resumable))
    listed_parts = {_part_of(one) for one in artifact.files}
    for path, size in artifact.dir.sizes(ROWS).items():
        folder, _, name = path.rpartition("/")
        if path in artifact.files or path.startswith(whole):
            continue
        if folder not in artifact.attempts and (name.endswith(".parquet") or name == _PLAN):
            yield path, size, "uncommitted attempt"
        elif name.endswith(".parquet"):
            part = _part_of(path)
            again = part is not None and part in listed_parts
            yield path, size, _AGAIN if again else "not in the manifest"


def _part_of(path: str) -> tuple[str, int] | None:
    folder, _, name = path.rpartition("/")
    match = _PART.fullmatch(name)
    return (folder, int(match[1])) if match else None


def _indexes(artifact: _Artifact) -> _Found:
    """Yield indexes inside an artifact that have other ids than its rows.

    A run under another config writes its index before it is refused. Without proof of the index
    that was used, all are kept.
    """
    folders = [one for one in subfolders(artifact.dir) if INDEX_FOLDER.fullmatch(one)]
    used = [name for name, _ in used_indexes(artifact.dir, folders)] if len(folders) > 1 else []
    for folder in folders:
        if used and folder not in used:
            for path, size in artifact.dir.sizes(folder).items():
                yield path, size, "unused index"


def _retries(artifact: _Artifact) -> _Found:
    """Yield indexes of retries that neither are committed nor can be resumed."""
    for path, size in artifact.dir.sizes("retry").items():
        match = _RETRY.fullmatch(path)
        if match and int(match[1]) > artifact.next_attempt:
            yield path, size, "abandoned retry"


def _checkpoints(artifact: _Artifact) -> _Found:
    if not artifact.attempts:
        return
    for folder in subfolders(artifact.dir):
        if _CHECKPOINT.fullmatch(folder):
            for path, size in artifact.dir.sizes(folder).items():
                yield path, size, "checkpoint of version 0.1"


def _lease_files(folder: Storage) -> _Found:
    """Yield claims and heartbeats of ended writers before the newest.

    A claim stays while the writer before it may be alive: that writer looks for it
    (`refuse_overtaken`).
    """
    claims, sizes = lease.claims(folder), folder.sizes("lease")
    kept, before_ended = set(claims[-1:]), True
    for path in claims[:-1]:
        ended = _has_ended(folder, path)
        if not (ended and before_ended):
            kept.add(path)
        before_ended = ended
    for path in claims:
        if path in kept:
            kept.add(lease.beat_path(json.loads(folder.get(path)).get("token", "")))
    for path, size in sizes.items():
        if path.endswith(".json") and path not in kept:
            yield path, size, "lease of an ended writer"


def _has_ended(folder: Storage, path: str) -> bool:
    claim, beat = json.loads(folder.get(path)), json.loads(lease.last_beat(folder, path))
    return beat.get("state") == "released" or lease.is_dead_here(claim)


def _staging(artifact: _Artifact, min_age_s: float) -> _Found:
    """Yield unfinished writes of a local root that nothing wrote to for some time."""
    if not is_local(artifact.dir.root):
        return
    root = local_path(artifact.dir.root)
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            file = Path(folder, name)
            path = file.relative_to(root).as_posix()
            if not _STAGING.fullmatch(name) or path in artifact.files:
                continue
            with suppress(FileNotFoundError):
                found = file.lstat()
                if time.time() - found.st_mtime >= min_age_s:
                    yield path, found.st_size, "unfinished write"


def _delete_under_lease(artifact: _Artifact, paths: list[str], timing: LeaseTiming) -> None:
    """Delete objects of a finished artifact while its manifests stay as they were."""
    with lease.hold(artifact.dir, timing=timing) as held:
        for first in range(0, len(paths), _BATCH):
            if _manifests(artifact.root, artifact.ref) != artifact.manifests:
                raise LeaseLost(
                    f"a manifest of {artifact.ref} was changed while it was pruned. Nothing more "
                    "was deleted; run again"
                )
            held.check()
            _delete(artifact.dir, paths[first : first + _BATCH])
        # The claim of this call replaces the one before it.
        _delete(artifact.dir, [path for path, _, _ in _lease_files(artifact.dir)])


def _delete(folder: Storage, paths: Iterable[str]) -> None:
    """Delete objects; in a local root also folders that are then empty."""
    paths = list(paths)
    folder.delete_objects(paths)
    if is_local(folder.root):
        parents = {parent for path in paths for parent in Path(path).parents}
        for parent in sorted(parents - {Path(".")}, key=lambda one: -len(one.parts)):
            with suppress(OSError):  # not empty
                (local_path(folder.root) / parent).rmdir()
