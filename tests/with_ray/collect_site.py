# SPDX-License-Identifier: Apache-2.0
"""A collection of teacher captions to be killed: pictures, a provider that fails, real drivers."""

import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sg4v_ray.captions.session import LOST
from sg4v_ray.core.artifact import Manifest, Ref, find
from sg4v_ray.core.records import ImageRow, TeacherCaptionRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from tests.row_artifacts import finish_rows
from tests.teacher.desk_site import KEY, picture
from tests.teacher_server.running import Running
from tests.with_ray.caption_site import Driver

IMAGES, OUT = Ref(name="images"), Ref(name="teacher-captions")
KEY_VARIABLE = "A_TEACHERS_KEY"
FLAGS = (
    "folder",
    "--config.teacher.max-tokens=512",
    f"--endpoint.api-key-env={KEY_VARIABLE}",
    "--endpoint.timeout-s=12",
    "--endpoint.limits.requests-per-min=None",
    "--endpoint.limits.tokens-per-min=None",
    "--endpoint.limits.in-flight=64",
    "--config.budget.max-reject-rate=0.5",
    "--config.teacher.model=gpt-4o",
    "--batching.rows-per-part=100",
    "--batching.rows-per-task=16",
    "--where.engine-cpus=0.5",
    "--where.no-progress",
)


@dataclass(frozen=True)
class CollectSite:
    """A root with an index of pictures, and a provider."""

    storage: Storage
    provider: Running
    logs: Path
    num_images: int

    def drive(
        self,
        *flags: str,
        job: str = "jobs.collect_captions",
        environment: dict[str, str] | None = None,
    ) -> Driver:
        """Start the collection, or another job at it, as its users do."""
        argv = [
            *(sys.executable, "-m", job, *FLAGS),
            f"--where.root={self.storage.root}",
            f"--endpoint.base-url={self.provider.url}",
            *flags,
        ]
        log = self.logs / f"{time.monotonic_ns()}.log"
        return Driver(argv, log, {KEY_VARIABLE: KEY, **(environment or {})})

    def manifest(self) -> Manifest:
        """Return what was committed."""
        return find(self.storage, OUT)

    def rows(self) -> list[TeacherCaptionRow]:
        """Return the finished rows."""
        rows: list[TeacherCaptionRow] = read_rows(self.storage, OUT, TeacherCaptionRow)
        return rows

    def lost(self) -> list[dict[str, Any]]:
        """Return what the job says it may have paid for without an answer."""
        found: list[dict[str, Any]] = json.loads(self.storage.get(f"{OUT.path}/{LOST}"))
        return found

    def paid(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Return the provider's billed requests by image and prompt."""
        found = defaultdict(list)
        for entry in self.provider.entries():
            if entry.get("billed"):
                found[entry["image"], entry["prompt"]].append(entry)
        return found

    def check_nothing_paid_twice_but_what_is_reported(self) -> None:
        """Assert that of each image and prompt all payments but one are reported as lost."""
        reported = {one["ticket"] for one in self.lost()}
        for entries in self.paid().values():
            kept = [one for one in entries if one["client_request_id"] not in reported]
            assert len(kept) <= 1, entries


def make_collect_site(tmp_path: Path, provider: Running, num_images: int) -> CollectSite:
    """Write pictures and their index."""
    storage = Storage(str(tmp_path / "root"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(num_images):
        file = folder / f"{number:06d}.jpg"
        file.write_bytes(picture(number))
        rows.append(
            ImageRow(
                id=f"{number:06d}",
                source="folder",
                uri=str(file),
                size_bytes=file.stat().st_size,
            )
        )
    finish_rows(storage, IMAGES, ImageRow, rows)
    logs = tmp_path / "logs"
    logs.mkdir()
    return CollectSite(storage, provider, logs, num_images)
