# SPDX-License-Identifier: Apache-2.0
"""`prune` finds known leftovers, deletes exactly those, and never what may be needed."""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import prune as job
from sg4v_ray.captions.session import LEDGER
from sg4v_ray.core import lease as leases
from sg4v_ray.core.artifact import Ref, begin, commit, find
from sg4v_ray.core.errors import ArtifactMissing, ConfigError, LeaseLost
from sg4v_ray.core.lease import LeaseTiming, hold
from sg4v_ray.core.prune import TEACHER_LEDGER, Unreferenced, find_unreferenced, prune
from sg4v_ray.core.row_files import put_table, write_index
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.verify import verify

REF = Ref(name="captions")
FAST = LeaseTiming(ttl_s=0.6, heartbeat_s=0.1)
ATTEMPT = "rows/attempt-0001"
PART = f"{ATTEMPT}/part-000000.parquet"
DEAD = {"machine": "elsewhere", "pid": "1", "started": "1", "token": "dead", "state": "held"}
"""A claim of a writer that may be alive on another machine."""


def rows(*keys: str) -> pa.Table:
    return pa.table({"id": list(keys)})


def finish(storage: Storage, ref: Ref = REF, **fields: Any) -> Storage:
    """Write an artifact of two rows in one part; return its folder."""
    home = begin(storage, ref, {})
    files = (put_table(home, PART, rows("a", "b")),)
    home.put(f"{ATTEMPT}/plan.json", b"{}")
    given = {"counts": {"rows": 2}, "attempts": (ATTEMPT,), "files": files, **fields}
    with hold(home, timing=FAST) as lease:
        commit(storage, ref, config={}, inputs={}, lease=lease, **given)
    return home


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


@pytest.fixture
def home(storage: Storage) -> Storage:
    return finish(storage)


def place_of(folder: Storage, path: str) -> Path:
    return Path(folder.root, path)


def old(place: Path, age_s: float = 7200.0) -> None:
    """Write a file that was last written to some time ago."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"12345")
    os.utime(place, (time.time() - age_s,) * 2)


def tree(storage: Storage) -> dict[str, bytes]:
    root = Path(storage.root)
    return {
        one.relative_to(root).as_posix(): one.read_bytes()
        for one in root.rglob("*")
        if one.is_file()
    }


def found_in(storage: Storage, ref: Ref | None = REF) -> dict[str, str]:
    """Return the reason of each object by its path below the artifact."""
    found = find_unreferenced(storage, ref, timing=FAST)
    return {one.path.removeprefix(f"{REF.path}/"): one.reason for one in found}


KEPT = (
    "config.json",
    "status.json",
    "curves/20260101.json",
    "report.html",
    "llava.json",
    "files/easy-vqa/0.png",
    "notes#a.txt",
    f"{ATTEMPT}/notes.txt",
    "rows/0123abcd/notes.txt",
    "model/config.json",
    "checkpoints/step-1/x.bin",
    "retry/attempt-0002/reasons.json",
    "retry/attempt-0002/index/part-00000.parquet",
    "rows/attempt-0002/plan.json",
    "rows/attempt-0002/part-000000.parquet",
    f"chosen-{'0' * 16}/part-00000.parquet",
)
"""What people or jobs may need: the second attempt is a retry that was started."""
LEFT = {
    f"{ATTEMPT}/part-000000.r1.parquet": "superseded part",
    f"{ATTEMPT}/part-000077.parquet": "not in the manifest",
    f"{ATTEMPT}/foreign.parquet": "not in the manifest",
    "rows/0123abcd/part-00000.parquet": "uncommitted attempt",
    "rows/attempt-0007/plan.json": "uncommitted attempt",
    "retry/attempt-0007/index/part-00000.parquet": "abandoned retry",
    "checkpoint-0001/x.parquet": "checkpoint of version 0.1",
    "checkpoint-0002/deep/x.parquet": "checkpoint of version 0.1",
}
STAGING = (
    f"{ATTEMPT}/part-000000.parquet#1",
    "manifest.json#123456789012345678901234567890",
    "model/weights.bin#2",
    "lease/beats/x.json#1",
)


def litter(home: Storage) -> None:
    for path in (*KEPT, *LEFT):
        if not home.exists(path):
            home.put(path, b"12345")
    for path in (*STAGING, "notes#a.txt"):
        old(place_of(home, path), age_s=60.0)


def test_every_known_leftover_is_found_and_nothing_else(storage: Storage, home: Storage) -> None:
    assert found_in(storage) == {}
    litter(home)
    assert found_in(storage) == LEFT | dict.fromkeys(STAGING, "unfinished write")
    (one,) = (one for one in find_unreferenced(storage) if one.path.endswith("foreign.parquet"))
    path = f"captions/v1/{ATTEMPT}/foreign.parquet"
    assert one == Unreferenced(path=path, size_bytes=5, reason="not in the manifest")


def test_finding_writes_nothing(storage: Storage, home: Storage) -> None:
    litter(home)
    before = tree(storage)
    find_unreferenced(storage)
    assert tree(storage) == before


@pytest.mark.parametrize("ref", [REF, None])
def test_exactly_what_was_found_is_deleted(
    storage: Storage, home: Storage, ref: Ref | None
) -> None:
    litter(home)
    before, found = tree(storage), find_unreferenced(storage, ref)
    assert prune(storage, ref, timing=FAST) == found
    after = {path: data for path, data in tree(storage).items() if "/lease/" not in path}
    gone = {one.path for one in found}
    assert after == {
        path: data for path, data in before.items() if "/lease/" not in path and path not in gone
    }
    assert not place_of(home, "checkpoint-0002").exists()
    assert found_in(storage, ref) == {}
    assert verify(storage, REF).rows == 2


def test_files_of_every_manifest_and_its_retries_are_kept(storage: Storage, home: Storage) -> None:
    earlier = find(storage, REF)
    path = "rows/attempt-0002/part-000000.parquet"
    file = put_table(home, path, rows("a"))
    home.put("retry/attempt-0002/index/part-00000.parquet", b"x")
    with hold(home, timing=FAST) as lease:
        commit(
            storage, REF, config={}, inputs={}, counts={"rows": 2}, lease=lease,
            attempts=(*earlier.attempts, "rows/attempt-0002"), files=(file,),
        )  # fmt: skip
    home.put(path.replace(".parquet", ".r1.parquet"), b"12345")
    reasons = {key: one for key, one in found_in(storage).items() if "lease" not in key}
    assert reasons == {"rows/attempt-0002/part-000000.r1.parquet": "superseded part"}


def test_rows_of_format_1_are_all_kept(storage: Storage, home: Storage) -> None:
    home.put(f"{ATTEMPT}/0355_000001-0.parquet", b"12345")
    assert len(found_in(storage)) == 1
    manifest = json.loads(home.get("manifest.json"))
    del manifest["files"], manifest["format"]
    home.put("manifest.json", json.dumps(manifest).encode())
    assert found_in(storage) == {}


def test_an_index_is_removable_only_beside_the_one_that_was_used(
    storage: Storage, home: Storage
) -> None:
    used = write_index(home.sub(f"chosen-{'1' * 16}"), [rows("a", "b")])
    write_index(home.sub(f"chosen-{'2' * 16}"), [rows("c")])
    assert found_in(storage) == {}, "nothing proves which index was used"
    home.put(f"{ATTEMPT}/plan.json", json.dumps({"index_sha256": used.sha256}).encode())
    folder = f"chosen-{'2' * 16}"
    assert found_in(storage) == dict.fromkeys(
        (f"{folder}/index.json", f"{folder}/part-00000.parquet"), "unused index"
    )


def test_indexes_with_the_ids_of_the_used_one_are_all_kept(storage: Storage, home: Storage) -> None:
    used = write_index(home.sub(f"chosen-{'2' * 16}"), [rows("a", "b")])
    write_index(home.sub(f"chosen-{'1' * 16}"), [rows("a", "b")])  # e.g. with another prompt
    home.put(f"{ATTEMPT}/plan.json", json.dumps({"index_sha256": used.sha256}).encode())
    assert found_in(storage) == {}


def test_leases_of_ended_writers_are_removable_the_newest_is_not(
    storage: Storage, home: Storage
) -> None:
    for _ in range(2):
        with hold(home, timing=FAST):
            pass
    first, second, newest = home.list_folder("lease")
    assert found_in(storage).keys() == {
        path
        for one in (first, second)
        for path in (one, f"lease/beats/{json.loads(home.get(one))['token']}.json")
    }
    assert len(prune(storage, REF, timing=FAST)) == 4
    assert newest not in home.list_folder("lease"), "the claim of prune itself took its place"
    assert len(home.list_folder("lease/beats")) == len(home.list_folder("lease")) == 1
    with hold(home, timing=FAST) as lease:
        assert lease.number == 5, "numbers are never used twice"


def test_a_claim_that_a_writer_may_still_look_for_is_kept(storage: Storage) -> None:
    home = storage.sub(REF.path)
    home.put("lease/000001.json", json.dumps(DEAD).encode())
    finish(storage)
    with hold(home, timing=FAST):
        pass
    assert found_in(storage) == {}, "writer 1 may be alive, and writer 2 is its sign to stop"
    home.put("lease/000001.json", json.dumps(DEAD | {"state": "released"}).encode())
    assert len(found_in(storage)) == 3


@pytest.mark.parametrize("call", [find_unreferenced, prune])
def test_an_artifact_that_is_being_written_is_skipped(
    storage: Storage,
    home: Storage,
    call: Callable[..., list[Unreferenced]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    litter(home)
    finish(storage, Ref(name="others")).put("checkpoint-0001/x", b"1")
    before = tree(storage.sub(REF.name))
    monkeypatch.setattr(logging.getLogger("sg4v_ray"), "propagate", True)
    with hold(home, timing=replace(FAST, heartbeat_s=0.05)):
        found = call(storage, timing=FAST)
    assert [one.path for one in found] == ["others/v1/checkpoint-0001/x"]
    assert "captions@v1 is skipped: a job is writing it" in caplog.text
    after = tree(storage.sub(REF.name))
    assert {path for path in before if "lease" not in path} <= after.keys()


def test_a_manifest_that_appears_meanwhile_stops_it(
    storage: Storage, home: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    litter(home)
    before = tree(storage)

    @contextmanager
    def slow(folder: Storage, *, timing: LeaseTiming) -> Iterator[leases.Lease]:
        folder.put("manifest-0002.json", folder.get("manifest.json"))
        with hold(folder, timing=timing) as lease:
            yield lease

    monkeypatch.setattr(leases, "hold", slow)
    with pytest.raises(LeaseLost, match=r"a manifest of captions@v1 was changed.*run again"):
        prune(storage, REF, timing=FAST)
    assert before.keys() <= tree(storage).keys()


def test_an_unfinished_artifact_loses_old_staging_files_alone(storage: Storage) -> None:
    home = begin(storage, REF, {})
    litter(home)
    assert found_in(storage) == {}, "a living writer may have them open"
    old(place_of(home, f"{ATTEMPT}/part-000003.parquet#7"))
    assert found_in(storage) == {f"{ATTEMPT}/part-000003.parquet#7": "unfinished write"}
    before = tree(storage)
    assert [one.size_bytes for one in prune(storage)] == [5]
    assert before.keys() - tree(storage).keys() == {f"captions/v1/{ATTEMPT}/part-000003.parquet#7"}


def test_a_staging_file_that_is_written_to_is_kept(storage: Storage, home: Storage) -> None:
    old(place_of(home, "llava.json#1"), age_s=1.0)
    assert found_in(storage) == {}


def test_the_ledger_of_the_teacher_is_never_touched(storage: Storage, home: Storage) -> None:
    assert TEACHER_LEDGER == LEDGER
    ledger = storage.sub(LEDGER)
    for _ in range(2):
        with hold(ledger, timing=FAST):
            pass
    begin(storage, Ref(name=LEDGER, version="notes"), {})
    old(place_of(ledger, "notes/000001-00000001.jsonl#1"))
    old(place_of(ledger, "v1/x#1"))
    home.put("checkpoint-0001/x", b"1")
    before = tree(ledger)
    assert [one.path for one in prune(storage)] == ["captions/v1/checkpoint-0001/x"]
    assert tree(ledger) == before
    for call in (find_unreferenced, prune):
        with pytest.raises(ConfigError, match="records paid requests and is never pruned"):
            call(storage, Ref(name=LEDGER, version="notes"))


def test_folders_of_other_software_are_not_touched(storage: Storage, home: Storage) -> None:
    for text in ('{"name": "x"}', "[]", "no JSON"):
        other = storage.sub(f"trainer/run-{len(text)}")
        other.put("manifest.json", text.encode())
        other.put("checkpoint-0001/model.safetensors", b"1")
        old(place_of(other, "x#1"))
    old(place_of(storage, "Trainer/Run/x#1"))
    old(place_of(storage, "trainer/empty/x#1"))
    assert find_unreferenced(storage) == []


def test_an_artifact_of_a_newer_version_is_skipped(storage: Storage, home: Storage) -> None:
    litter(home)
    manifest = json.loads(home.get("manifest.json")) | {"format": 3}
    home.put("manifest.json", json.dumps(manifest).encode())
    assert find_unreferenced(storage) == []


def test_an_address_without_an_artifact_is_an_error(storage: Storage) -> None:
    with pytest.raises(ArtifactMissing, match="captions@v9 is not finished"):
        find_unreferenced(storage, Ref(name="captions", version="v9"))
    assert find_unreferenced(storage) == []


def test_a_bucket(s3: dict[str, str]) -> None:
    storage = Storage("s3://sg4v-test/prune")
    home = finish(storage)
    for path in (*KEPT, *LEFT):
        if not home.exists(path):
            home.put(path, b"12345")
    before = set(home.list())
    assert found_in(storage, None) == LEFT
    assert len(prune(storage, timing=FAST)) == len(LEFT)
    assert {path for path in before - set(home.list()) if "lease" not in path} == set(LEFT)
    assert find_unreferenced(storage) == []


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prune", *flags])
        job.run()
        return capsys.readouterr().out

    return run


def test_the_job_lists_first_and_prints_the_command_that_deletes(
    storage: Storage, home: Storage, call: Callable[..., str]
) -> None:
    litter(home)
    before = tree(storage)
    lines = call("captions@v1", "--root", storage.root).splitlines()
    assert tree(storage) == before
    assert lines[0].split() == ["path", "bytes", "reason"]
    (line,) = (line for line in lines if "foreign" in line)
    assert line.split(maxsplit=2) == [
        f"captions/v1/{ATTEMPT}/foreign.parquet",
        "5",
        "not in the manifest",
    ]
    assert "12 objects, 60 bytes" in lines[-2]
    assert "nothing was deleted" in lines[-2]

    python, _, module, *flags = shlex.split(lines[-1])
    assert (python, module) == ("python", "jobs.prune")
    lines = call(*flags).splitlines()
    assert lines[-1] == f"deleted 12 objects, 60 bytes in captions@v1 at {storage.root}"
    assert ["checkpoint of version 0.1", "2", "10"] in [line.rsplit(maxsplit=2) for line in lines]
    assert len(before) - 12 == len(tree(storage))
    assert call("--root", storage.root) == f"nothing to remove in {storage.root}\n"
