# SPDX-License-Identifier: Apache-2.0
"""`status.json` follows the artifact: stopped without a manifest, finished with its figures."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from sg4v_ray.core.errors import LeaseLost, StorageError, TooManyRejects
from sg4v_ray.core.lease import Lease, LeaseTiming, hold
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.monitor import STATUS, JobMonitor, put_final_status, stopped_on_error

FAST = LeaseTiming(ttl_s=0.6, heartbeat_s=0.1)
COUNTS = {"rows": 5, "rejected": 2, "tokens": 90, "rejected_missing": 2, "rejected_refused": 0}
RUNNING = {"state": "committing", "rejected": {"missing": 1}, "queue": 3, "usd_so_far": 1.5}


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "captions"))


def put(folder: Storage, status: object) -> None:
    folder.put(STATUS, json.dumps(status).encode())


def read(folder: Storage) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(folder.get(STATUS))
    return status


def test_the_last_status_has_the_counts_of_the_manifest_and_the_cost_of_all_runs(
    folder: Storage,
) -> None:
    put(folder, RUNNING)
    put_final_status(folder, COUNTS)
    last = read(folder)
    assert (last["state"], last["done"], last["total"], last["queue"]) == ("finished", 5, 5, 0)
    assert last["rejected"] == {"missing": 2}
    assert last["usd_so_far"] == last["usd_expected"] == 1.5


def test_a_last_status_that_cannot_be_written_does_not_fail_a_committed_job(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Storage, "put", fails)
    put_final_status(folder, COUNTS)
    assert "out of date: no space left" in caplog.text


@pytest.mark.parametrize("state", ["committing", "running"])
def test_an_error_before_the_commit_leaves_no_committing_job(folder: Storage, state: str) -> None:
    put(folder, {**RUNNING, "state": state})
    with (
        hold(folder, timing=FAST) as lease,
        pytest.raises(TooManyRejects),
        stopped_on_error(folder, lease),
    ):
        raise TooManyRejects("3 of 5 rows")
    assert read(folder)["state"] == ("stopped" if state == "committing" else state)


def test_an_overtaken_writer_leaves_the_status_of_its_successor(
    folder: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    put(folder, RUNNING)
    caplog.set_level(logging.WARNING)
    with hold(folder, timing=FAST) as lease:
        Lease(folder, lease.number + 1, FAST)._claim()
        with pytest.raises(LeaseLost, match="first"), stopped_on_error(folder, lease):
            raise LeaseLost("another job committed first")
    assert read(folder) == RUNNING
    assert not caplog.text


@pytest.mark.parametrize("data", [b"", b"[]", b'{"state": '])
def test_a_damaged_status_ends_a_job_before_its_cost_is_forgotten(
    folder: Storage, data: bytes
) -> None:
    folder.put(STATUS, data)
    with pytest.raises(StorageError, match=r"status.json is damaged.* delete it and run again"):
        JobMonitor(
            cast(Any, None),
            folder,
            name="captions/v1",
            done=0,
            total=5,
            where=Where(root=folder.root),
            lease=cast(Lease, None),
        )
