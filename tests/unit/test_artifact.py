# SPDX-License-Identifier: Apache-2.0
"""An artifact is complete or absent, is what its config says, and has one writer at a time."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sg4v_ray.core.artifact import Ref, begin, commit, find, is_finished
from sg4v_ray.core.errors import (
    ArtifactDrift,
    ArtifactMissing,
    ConfigError,
    LeaseHeld,
    LeaseLost,
    StorageError,
)
from sg4v_ray.core.lease import LeaseTiming, hold
from sg4v_ray.core.row_files import RowFile
from sg4v_ray.core.storage import Storage
from tests.waiting import eventually

REF = Ref(name="captions", version="v1")
FAST = LeaseTiming(ttl_s=0.6, heartbeat_s=0.1)
INPUTS = {"images@v1": "abc"}
FILE = RowFile(path="rows/1/part-0.parquet", rows=2, size_bytes=1, ids_sha256="0" * 64)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def finish(storage: Storage, config: object) -> None:
    home = begin(storage, REF, config, inputs=INPUTS)
    with hold(home, timing=FAST) as lease:
        commit(storage, REF, config=config, inputs=INPUTS, counts={"rows": 2}, lease=lease)


def test_an_artifact_without_a_manifest_does_not_exist(storage: Storage) -> None:
    with pytest.raises(ArtifactMissing, match=r"captions@v1 is not finished.*Run the job that"):
        find(storage, REF)
    begin(storage, REF, {"beams": 3})
    with pytest.raises(ArtifactMissing, match=r"captions@v1 is not finished.*run it again"):
        find(storage, REF)
    assert not is_finished(storage, REF, config={"beams": 3})


def test_a_finished_artifact_says_what_it_is(storage: Storage) -> None:
    finish(storage, {"beams": 3})
    manifest = find(storage, REF, config={"beams": 3}, inputs=INPUTS)
    assert manifest.counts == {"rows": 2}
    assert manifest.inputs == INPUTS
    assert manifest.provenance["python"]
    json.loads(storage.get("captions/v1/manifest.json"))


def test_a_manifest_names_no_folder_of_the_machine(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["/home/me/jobs/x.py", "demo", "--where.root", "/home/me/runs", "--out.version=v2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--where.max-actors=2"])
    finish(storage, {"beams": 3})
    assert find(storage, REF).provenance["argv"] == "x.py demo --out.version=v2"


def test_another_config_is_drift_with_both_values(storage: Storage) -> None:
    finish(storage, {"beams": 3})
    with pytest.raises(ArtifactDrift, match=r"config\.beams: 3 there, 1 here"):
        find(storage, REF, config={"beams": 1}, inputs=INPUTS)


def test_other_inputs_are_drift(storage: Storage) -> None:
    finish(storage, {"beams": 3})
    with pytest.raises(ArtifactDrift, match=r"inputs\.images@v1: 'abc' there, 'xyz' here"):
        is_finished(storage, REF, config={"beams": 3}, inputs={"images@v1": "xyz"})


def test_drift_is_noticed_before_there_is_a_manifest(storage: Storage) -> None:
    begin(storage, REF, {"beams": 3})
    begin(storage, REF, {"beams": 3})
    with pytest.raises(ArtifactDrift):
        begin(storage, REF, {"beams": 1})


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b", ".hidden"])
def test_names_stay_inside_the_root(name: str) -> None:
    with pytest.raises(ConfigError):
        Ref(name=name)


def test_a_stage_that_resumes_nothing_replaces_the_config_of_an_unfinished_attempt(
    storage: Storage,
) -> None:
    home = begin(storage, REF, {"beams": 3}, inputs=INPUTS)
    with pytest.raises(ArtifactDrift):
        begin(storage, REF, {"beams": 4}, inputs=INPUTS)
    with hold(home, timing=FAST) as lease:
        begin(storage, REF, {"beams": 4}, inputs=INPUTS, lease=lease)
        commit(storage, REF, config={"beams": 4}, inputs=INPUTS, counts={}, lease=lease)
    find(storage, REF, config={"beams": 4}, inputs=INPUTS)


def test_a_retry_of_a_format_1_artifact_with_a_raised_limit_opens_under_its_own_config(
    storage: Storage,
) -> None:
    own, raised = {"max_pixels": 5}, {"max_pixels": 9}
    finish(storage, own)
    first = replace(find(storage, REF), identity={}, format=1)
    storage.put(f"{REF.path}/manifest.json", json.dumps(asdict(first)).encode())
    with hold(storage.sub(REF.path), timing=FAST) as lease:
        commit(
            storage, REF, config=raised, inputs=INPUTS, counts={"rows": 2}, lease=lease,
            earlier=first, attempts=("rows/1", "rows/2"), files=(FILE,),
        )  # fmt: skip
    assert find(storage, REF, config=own, inputs=INPUTS).attempts == ("rows/1", "rows/2")


def test_a_second_writer_is_refused_while_the_first_lives(storage: Storage) -> None:
    second = hold(storage, timing=FAST)
    with hold(storage, timing=FAST), pytest.raises(LeaseHeld, match=f"process {os.getpid()} on "):
        second.__enter__()


def test_a_released_lease_passes_at_once(storage: Storage) -> None:
    with hold(storage) as first:
        pass
    with hold(storage) as second:
        assert second.number == first.number + 1


def test_a_killed_writer_of_this_machine_is_noticed_at_once(storage: Storage) -> None:
    script = (
        "import sys, os, signal\n"
        "from sg4v_ray.core.lease import hold\n"
        "from sg4v_ray.core.storage import Storage\n"
        "with hold(Storage(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, storage.root], check=False)
    with hold(storage) as lease:  # the default time to live is longer than the test's timeout
        assert lease.number == 2


def test_a_silent_writer_of_another_machine_expires(storage: Storage) -> None:
    foreign = {"machine": "elsewhere/1", "pid": "1", "started": "1", "state": "held", "beat": "0"}
    storage.put("lease/000001.json", json.dumps(foreign).encode())
    with hold(storage, timing=FAST) as lease:
        assert lease.number == 2


def test_a_missed_heartbeat_does_not_end_the_heartbeats(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, put, missed = begin(storage, REF, {}), Storage.put, threading.Event()

    def fails_once(self: Storage, path: str, data: bytes) -> None:
        if path.startswith("lease/") and not missed.is_set():
            missed.set()
            raise OSError("the disk was away")
        put(self, path, data)

    with hold(home, timing=FAST) as lease:
        beats = f"lease/beats/{lease.token}.json"
        eventually(lambda: home.exists(beats))
        before = home.get(beats)
        monkeypatch.setattr(Storage, "put", fails_once)
        assert missed.wait(10)
        deadline = time.monotonic() + 10
        while home.get(beats) == before:
            assert time.monotonic() < deadline, "no heartbeat followed the missed one"
            missed.wait(0.05)


def test_an_overtaken_writer_cannot_commit(storage: Storage) -> None:
    home = begin(storage, REF, {})
    with hold(home, timing=FAST) as lease:
        home.create("lease/000002.json", b"{}")  # another machine took over
        with pytest.raises(LeaseLost, match="writer 2 took over"):
            commit(storage, REF, config={}, inputs={}, counts={}, lease=lease)
        home.delete("lease/000002.json")
    assert not is_finished(storage, REF, config={})


def test_create_happens_once(storage: Storage) -> None:
    assert storage.create("a/b", b"1")
    assert not storage.create("a/b", b"2")
    assert storage.get("a/b") == b"1"


def test_a_changed_file_is_not_localised(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"good")
    digests = storage.upload(folder, "model")
    assert storage.localise("model", cache=tmp_path / "cache", digests=digests).is_dir()
    storage.put("model/weights", b"evil")
    with pytest.raises(StorageError, match="was changed after it was committed"):
        storage.localise("model", cache=tmp_path / "cache", digests=digests)


def test_a_relative_root_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=f"absolute path such as {os.getcwd()}/runs"):
        Storage("runs")
