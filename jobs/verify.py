# SPDX-License-Identifier: Apache-2.0
"""Check that a finished artifact has each id exactly once and that all recorded hashes agree.

python -m jobs.verify NAME@VERSION --root PATH_OR_URI [--json]

Reads the manifest, its files and the index that they were made from; writes nothing. Exit
code 1 if anything disagrees.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs._cli import main
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.text_table import text_table
from sg4v_ray.core.verify import Receipt, verify


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyJob:
    """The artifact to verify and the form of the receipt."""

    artifact: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME@VERSION")]
    """NAME@VERSION of a finished artifact."""
    root: str
    """Path or URI below which artifacts lie."""
    json: bool = False
    """Print the receipt as JSON."""
    progress: bool = True
    """Show a progress bar on stderr."""


def ref_of(text: str) -> Ref:
    """Return the address in NAME@VERSION.

    Raises:
        ConfigError: it has no version, or characters that addresses do not have.
    """
    name, at, version = text.partition("@")
    if not at:
        raise ConfigError(f"{text!r} has no version; write NAME@VERSION, as captions@v1")
    return Ref(name=name, version=version)


def storage_of(root: str) -> Storage:
    """Return the storage of a root; a relative path is below the working folder.

    Raises:
        ConfigError: there is no such folder.
    """
    storage = Storage(root if "://" in root else str(Path(root).absolute()))
    if storage.root.startswith("/") and not Path(storage.root).is_dir():
        raise ConfigError(f"there is no folder {storage.root}; check --root")
    return storage


def size_text(size_bytes: int) -> str:
    """Return a size with three significant digits in decimal units."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def table_of(receipt: Receipt) -> str:
    """Return a receipt as a table with its summary below."""
    counts = ", ".join(f"{value:,} {name}" for name, value in receipt.counts.items())
    lines = [
        ("manifest", f"{receipt.manifest}, format {receipt.format}"),
        ("fingerprint", receipt.fingerprint),
        ("inputs", ", ".join(f"{key} {value}" for key, value in receipt.inputs.items()) or "none"),
        ("attempts", f"{receipt.attempts:,}"),
        ("ids checked", f"{receipt.ids_checked:,}"),
        ("index", receipt.index),
        ("counts", counts or "none of rows"),
        ("hashes", receipt.hashes),
        ("seconds", f"{receipt.seconds:,.1f}"),
    ]
    width = max(len(value) for _, value in lines)
    table = text_table([(name, value.ljust(width)) for name, value in lines])
    return "\n".join([*(line.rstrip() for line in table.splitlines()), summary_of(receipt)])


def summary_of(receipt: Receipt) -> str:
    """Return a receipt in one line."""
    parts = []
    if receipt.files:
        parts += [f"{receipt.rows:,} ids, each exactly once"]
    if files := receipt.files + receipt.digests:
        parts += [f"{files:,} file{'s' if files > 1 else ''}", size_text(receipt.size_bytes)]
    if receipt.ids_sha256 is not None:
        parts.append(f"sha256 {receipt.ids_sha256}")
    return f"verified {receipt.artifact}: {', '.join(parts) or 'a manifest without files'}"


def run() -> None:
    """Run the job with the flags of this process."""
    job = tyro.cli(VerifyJob, description=__doc__, prog="python -m jobs.verify")
    receipt = verify(storage_of(job.root), ref_of(job.artifact), progress=job.progress)
    print(json.dumps(dataclasses.asdict(receipt), indent=1) if job.json else table_of(receipt))


if __name__ == "__main__":
    main(run, stopped="nothing was written")
