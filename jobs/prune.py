# SPDX-License-Identifier: Apache-2.0
"""List or delete what no manifest refers to: lost and repeated parts, old leases, staging files.

python -m jobs.prune [NAME@VERSION] --root PATH_OR_URI [--no-dry-run]

Without an address all artifacts below the root are searched. Nothing is deleted without
--no-dry-run. The teacher's ledger and artifacts that a job is writing are never touched.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs._cli import main
from jobs.verify import ref_of, size_text, storage_of
from sg4v_ray.core.prune import Unreferenced, find_unreferenced, prune
from sg4v_ray.core.text_table import text_table


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneJob:
    """The folders to search, and whether to delete."""

    artifact: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME@VERSION]")
    ] = None
    """NAME@VERSION of one artifact; all below the root without it."""
    root: str
    """Path or URI below which artifacts lie."""
    dry_run: bool = True
    """List what would be deleted, and delete nothing."""


def listing_of(found: Sequence[Unreferenced]) -> str:
    """Return a table of objects: path, bytes, reason."""
    width = max(len(one.reason) for one in found)
    lines = [("path", "bytes", "reason".ljust(width))]
    lines += [(one.path, f"{one.size_bytes:,}", one.reason.ljust(width)) for one in found]
    return "\n".join(line.rstrip() for line in text_table(lines).splitlines())


def sums_of(found: Sequence[Unreferenced]) -> str:
    """Return the number of objects and bytes by reason, and of all."""
    objects, sizes = Counter(one.reason for one in found), Counter[str]()
    for one in found:
        sizes[one.reason] += one.size_bytes
    lines = [("reason", "objects", "bytes")]
    lines += [(name, f"{objects[name]:,}", f"{sizes[name]:,}") for name in sorted(objects)]
    return text_table([*lines, ("all", f"{objects.total():,}", f"{sizes.total():,}")])


def command_of(job: PruneJob, root: str) -> str:
    """Return the command line that deletes what a job lists."""
    address = [] if job.artifact is None else [job.artifact]
    return shlex.join(["python", "-m", "jobs.prune", *address, "--root", root, "--no-dry-run"])


def run() -> None:
    """Run the job with the flags of this process."""
    job = tyro.cli(PruneJob, description=__doc__, prog="python -m jobs.prune")
    storage = storage_of(job.root)
    ref = None if job.artifact is None else ref_of(job.artifact)
    place = storage.root if ref is None else f"{ref} at {storage.root}"
    found = find_unreferenced(storage, ref) if job.dry_run else prune(storage, ref)
    if not found:
        print(f"nothing to remove in {place}")
        return
    total = size_text(sum(one.size_bytes for one in found))
    objects = f"{len(found):,} object{'s' if len(found) > 1 else ''}"
    if job.dry_run:
        print(f"{listing_of(found)}\n\n{sums_of(found)}\n")
        print(f"{objects}, {total} in {place}; nothing was deleted. Delete them with")
        print(f"  {command_of(job, storage.root)}")
    else:
        print(f"{sums_of(found)}\n\ndeleted {objects}, {total} in {place}")


if __name__ == "__main__":
    main(run, stopped="objects that were deleted stay deleted; run again to delete the others")
