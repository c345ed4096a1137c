# SPDX-License-Identifier: Apache-2.0
"""A writer that was stopped by SIGSTOP, longer than its lease, changes nothing when it continues.

Drivers are real processes, each with a Ray of its own. All processes of a driver are stopped, as by
a suspended virtual machine or a paused container.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import psutil
import pytest

from sg4v_ray.core.artifact import begin, commit, find
from sg4v_ray.core.errors import LeaseLost, Sg4vError
from sg4v_ray.core.lease import LeaseTiming, hold
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.row_files import read_table
from sg4v_ray.core.rows import ROWS, read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.verify import verify
from sg4v_ray.exactly_once.monitor import STATUS
from sg4v_ray.exactly_once.parts import part_name, read_footer
from sg4v_ray.recipes.easy_vqa import CAPTIONS
from tests.with_ray.caption_site import ROWS_PER_PART, Driver, Site, make_site

pytestmark = pytest.mark.timeout(1200)

Moment = Literal["before", "after"]
"""The time at which the first writer continues, relative to the commit of its successor."""
PARTS = 6
SLOW = "--engine.latency-s=0.08"
"""About 30 s of work for all rows: a busy machine stops a driver before it has finished."""
ATTEMPT = f"{ROWS}/attempt-0001"
OTHER_PROMPT = ("--config.generate.instruction=Name the colours of this image.",)


class Suspension:
    """All processes of a driver, stopped."""

    def __init__(self, driver: Driver) -> None:
        self._pids: set[int] = set()
        self.started_s = time.monotonic()
        while started := set(driver.below("")) - self._pids:  # a process may start others meanwhile
            self._send(started, signal.SIGSTOP)
            self._pids |= started

    def resume_workers(self) -> None:
        """Continue the driver's Ray; the driver stays stopped."""
        drivers = {one.pid for one in psutil.Process().children()}
        self._send(self._pids - drivers, signal.SIGCONT)

    def resume(self) -> None:
        """Continue all processes."""
        self._send(self._pids, signal.SIGCONT)

    @staticmethod
    def _send(pids: set[int], number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class Jobs:
    """Drivers and suspensions of a test; none outlives it."""

    def __init__(self) -> None:
        self._drivers: list[Driver] = []
        self._suspensions: list[Suspension] = []

    def drive(self, site: Site, *flags: str) -> Driver:
        """Start the captioning job."""
        self._drivers.append(site.drive(flags=flags))
        return self._drivers[-1]

    def suspend(self, driver: Driver) -> Suspension:
        """Stop a driver with all its processes."""
        self._suspensions.append(Suspension(driver))
        return self._suspensions[-1]

    def end(self) -> None:
        """Kill the drivers that still run; their Ray ends with them."""
        for driver in self._drivers:
            driver.kill()
        for suspension in self._suspensions:
            suspension.resume()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    started = Jobs()
    yield started
    started.end()


def take_over(site: Site) -> None:
    """Take the lease as a job on another machine does, with a shorter time to live."""
    with hold(artifact_dir(site), timing=LeaseTiming(ttl_s=1.0, heartbeat_s=0.2)) as lease:
        assert lease.number == 2


def artifact_dir(site: Site) -> Storage:
    return site.storage.sub(CAPTIONS.path)


def objects(site: Site) -> dict[str, str]:
    """Return the sha256 of each object of the artifact, without heartbeats."""
    folder = artifact_dir(site)
    return {
        path: hashlib.sha256(folder.get(path)).hexdigest()
        for path in folder.list()
        if not path.startswith("lease/beats/")
    }


def texts(site: Site, files: list[str]) -> set[str | None]:
    """Return the distinct texts of some row files."""
    tables = [read_table(artifact_dir(site), path, ["text"]) for path in files]
    return {text for table in tables for text in table["text"].to_pylist()}


def identity_of(site: Site, name: str) -> str:
    return read_footer(artifact_dir(site).sub(ATTEMPT), name).identity


def parts_of(site: Site, identity: str) -> list[str]:
    """Return the names of the parts that an artifact of this identity has."""
    return [
        name
        for name in artifact_dir(site).sub(ATTEMPT).list()
        if name.endswith(".parquet") and identity_of(site, name) == identity
    ]


def check_finished_by_the_newest_writer(site: Site) -> None:
    """Assert that the artifact is whole, in the reading of all readers, and has one writer."""
    site.check_exactly_once()
    ids = [row.id for row in read_rows(site.storage, CAPTIONS, CaptionRow)]
    assert ids == [f"i{n:04d}" for n in range(site.num_images)]
    folder = artifact_dir(site)
    *_, newest = folder.list_folder("lease")
    writer = json.loads(folder.get(newest))["token"]
    assert find(site.storage, CAPTIONS).provenance["writer"] == writer
    assert json.loads(folder.get(STATUS))["state"] == "finished"
    assert verify(site.storage, CAPTIONS).ids_checked == site.num_images


def check_ended_by_its_lease(driver: Driver, text: str) -> None:
    """Assert that a driver ends with exit code 1 and one sentence, without a traceback."""
    assert driver.wait() == 1
    assert driver.errors.rstrip().splitlines()[-1].startswith(f"LeaseLost: {text}")
    assert driver.errors.count("LeaseLost") == 1
    assert "Traceback" not in driver.errors


@pytest.mark.parametrize(
    ("moment", "has_full_lease"),
    [
        ("after", False),
        pytest.param("before", False, marks=pytest.mark.scale),
        pytest.param("before", True, marks=pytest.mark.scale),
        pytest.param("after", True, marks=pytest.mark.scale),
    ],
)
def test_a_writer_that_continues_after_it_was_overtaken_changes_nothing(
    tmp_path: Path, tiny_model: Path, jobs: Jobs, moment: Moment, has_full_lease: bool
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, PARTS * ROWS_PER_PART)
    old = jobs.drive(site, SLOW)
    old.until(lambda: site.committed() > 0)
    stopped = jobs.suspend(old)
    if not has_full_lease:
        take_over(site)
    successor = jobs.drive(site, *([SLOW] if moment == "before" else []))
    if moment == "before":
        successor.until(lambda: site.committed() >= (PARTS - 2) * ROWS_PER_PART)
    else:
        successor.succeed()
    if has_full_lease:
        assert time.monotonic() - stopped.started_s > LeaseTiming().ttl_s
    before = objects(site)
    stopped.resume()
    check_ended_by_its_lease(old, "writer ")
    successor.succeed()
    after = objects(site)
    if moment == "after":
        assert after == before
    else:
        rows = {path: digest for path, digest in before.items() if path.startswith(ATTEMPT)}
        assert rows.items() <= after.items()
    check_finished_by_the_newest_writer(site)


@pytest.mark.scale
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_writer_of_a_deleted_artifact_adds_nothing_to_its_successor_with_another_prompt(
    tmp_path: Path, tiny_model: Path, jobs: Jobs, moment: Moment
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, PARTS * ROWS_PER_PART)
    old = jobs.drive(site, SLOW)
    old.until(lambda: site.committed() >= 3 * ROWS_PER_PART)
    stopped = jobs.suspend(old)
    old_identity = identity_of(site, part_name(0))
    old_texts = texts(site, [f"{ATTEMPT}/{part_name(0)}"])
    shutil.rmtree(artifact_dir(site).root)
    # As slow, so that the parts in flight of the old driver come before its own.
    successor = jobs.drive(site, *OTHER_PROMPT, *([SLOW] if moment == "before" else []))
    deleted = f"{artifact_dir(site).root} was deleted while this job wrote to it"
    if moment == "before":
        successor.until(lambda: site.committed() > 0)
        stopped.resume_workers()  # first: they commit the parts that they had in flight
        successor.until(lambda: parts_of(site, old_identity))
        stopped.resume()
        check_ended_by_its_lease(old, deleted)
        successor.succeed()
        foreign = parts_of(site, old_identity)
        files = [file.path for file in find(site.storage, CAPTIONS).files]
        for name in foreign:
            assert f"{name}: it belongs to another artifact or attempt" in successor.errors
            assert f"{ATTEMPT}/{name}" not in files
            assert f"{ATTEMPT}/{name.replace('.parquet', '.r1.parquet')}" in files
    else:
        successor.succeed()
        before = objects(site)
        stopped.resume()
        check_ended_by_its_lease(old, deleted)
        assert objects(site) == before
        fresh = make_site(str(tmp_path / "fresh"), tmp_path, tiny_model, site.num_images)
        jobs.drive(fresh, *OTHER_PROMPT).succeed()
        rows, fresh_rows = (read_rows(one.storage, CAPTIONS, CaptionRow) for one in (site, fresh))
        assert rows == fresh_rows
    check_finished_by_the_newest_writer(site)
    # All rows have the same image, so each prompt gives one text.
    new_texts = texts(site, [file.path for file in find(site.storage, CAPTIONS).files])
    assert len(new_texts) == len(old_texts) == 1
    assert new_texts != old_texts


def test_a_manifest_of_a_deleted_artifact_is_never_read_with_its_successors_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, old, new = Storage(str(tmp_path)), {"prompt": "old"}, {"prompt": "new"}
    with ExitStack() as successor, hold(begin(storage, CAPTIONS, old)) as lease:
        check = lease.check

        def check_and_be_stopped() -> None:
            check()
            storage.delete(CAPTIONS.path)
            successor.enter_context(hold(begin(storage, CAPTIONS, new)))

        monkeypatch.setattr(lease, "check", check_and_be_stopped)
        with suppress(LeaseLost):
            commit(storage, CAPTIONS, config=old, inputs={}, counts={}, lease=lease)
    with suppress(Sg4vError):  # refused with a sentence
        assert find(storage, CAPTIONS).config == new
