# SPDX-License-Identifier: Apache-2.0
"""Every id of the index exactly once in the output, whatever was killed on the way.

The drivers are real processes, each with a Ray of its own, and are killed with SIGKILL.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from sg4v_ray.batch.plan import verify
from sg4v_ray.core.artifact import Ref, begin, commit, find, is_finished
from sg4v_ray.core.errors import ArtifactCorrupt
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.rows import ROWS, put_rows, read_columns
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes.easy_vqa import CAPTIONS, TEST_IMAGES
from sg4v_ray.sources import shapes

pytestmark = pytest.mark.timeout(1500)

NUM_IMAGES = 300
ROWS_PER_BLOCK = 20
CAPTIONER = Ref(name="fake-captioner")
FLAGS = (
    "demo",
    f"--captioner.name={CAPTIONER.name}",
    "--engine.kind=fake",
    "--engine.latency-s=0.02",  # a caption takes about a second: time to be killed
    "--engine.capacity=16",
    "--engine.max-model-len=512",
    f"--flow.rows-per-block={ROWS_PER_BLOCK}",
    "--flow.batch-size=8",
    "--where.no-progress",
)
KILLED_AT_COMMIT = (
    "import os, signal, sys\n"
    "import jobs.caption_images as job\n"
    "from sg4v_ray.batch import stage\n"
    "stage.commit = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
    "job.run()\n"
)


@pytest.fixture
def storage(tmp_path: Path, tiny_model: Path) -> Storage:
    """A root with an index of drawn images and a captioner for the fake engine."""
    storage = Storage(str(tmp_path / "runs"))
    picture = tmp_path / "picture.png"
    shapes.draw(1).save(picture)
    rows = [
        ImageRow(id=f"i{n:04d}", source="drawn", uri=str(picture), size_bytes=1)
        for n in range(NUM_IMAGES)
    ]
    put_rows(storage.sub(TEST_IMAGES.path), f"{ROWS}/part-0.parquet", ImageRow, rows)
    finish(storage, TEST_IMAGES, attempts=(ROWS,))
    digests = storage.upload(tiny_model, f"{CAPTIONER.path}/model")
    finish(storage, CAPTIONER, digests=digests)
    return storage


def finish(storage: Storage, ref: Ref, **fields: object) -> None:
    with hold(begin(storage, ref, {})) as lease:
        commit(storage, ref, config={}, inputs={}, counts={}, lease=lease, **fields)


def drive(storage: Storage, *command: str) -> subprocess.Popen[bytes]:
    """Start the captioning job as its users do."""
    argv = [sys.executable, *command, *FLAGS, f"--where.root={storage.root}"]
    return subprocess.Popen(argv, cwd=Path(__file__).parents[2])


def captioned(storage: Storage) -> list[str]:
    return read_columns(storage.sub(f"{CAPTIONS.path}/{ROWS}"), ["id"])["id"].to_pylist()


def committed(storage: Storage) -> int:
    """Count the rows whose block is finished: files of rows may be half written, notes are not."""
    notes = storage.sub(f"{CAPTIONS.path}/checkpoint").list()
    return ROWS_PER_BLOCK * sum(1 for path in notes if not path.endswith(".pending.parquet"))


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert driver.poll() is None, "the driver ended before it was killed"
        assert time.monotonic() < deadline, "nothing happened for four minutes"
        time.sleep(0.05)


def check_exactly_once(storage: Storage) -> None:
    counts = Counter(captioned(storage))
    assert len(counts) == NUM_IMAGES
    assert set(counts.values()) == {1}
    assert find(storage, CAPTIONS).counts["rows"] == NUM_IMAGES


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_killed_drivers_and_one_killed_at_the_manifest_lose_and_double_nothing(
    storage: Storage, kills: int
) -> None:
    rng = random.Random(4)
    done = 0
    for _ in range(kills):
        target = done + rng.randint(10, 60)
        driver = drive(storage, "-m", "jobs.caption_images")
        wait_until(lambda goal=target: committed(storage) >= goal, driver)
        driver.kill()
        driver.wait()
        assert not is_finished(storage, CAPTIONS, config={})
        done = committed(storage)
    last = drive(storage, "-c", KILLED_AT_COMMIT)
    assert last.wait(timeout=400) == -signal.SIGKILL
    assert not is_finished(storage, CAPTIONS, config={})
    assert drive(storage, "-m", "jobs.caption_images").wait(timeout=400) == 0
    check_exactly_once(storage)


def engine_processes(driver: int) -> Iterator[int]:
    """Yield the processes of engine actors that a driver's Ray started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and "Generate" in command_line(int(entry.name)):
            ancestor = int(entry.name)
            while ancestor > 1 and ancestor != driver:
                ancestor = parent(ancestor)
            if ancestor == driver:
                yield int(entry.name)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_killed_engine_actor_loses_and_doubles_nothing(storage: Storage) -> None:
    driver = drive(storage, "-m", "jobs.caption_images")
    wait_until(lambda: committed(storage) >= 40, driver)
    engines = list(engine_processes(driver.pid))
    assert engines, "no engine actor was found to kill"
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    assert driver.wait(timeout=400) == 0
    check_exactly_once(storage)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        pytest.param(["a"], "1 ids missing, e.g. b", id="missing"),
        pytest.param(["a", "b", "b"], "1 ids double, e.g. b", id="double"),
        pytest.param(["a", "b", "c"], "1 ids not in the index, e.g. c", id="foreign"),
    ],
)
def test_the_commit_counts_and_names_what_is_wrong(found: list[str], problem: str) -> None:
    with pytest.raises(ArtifactCorrupt, match=problem):
        verify(pa.chunked_array([["a", "b"]]), pa.chunked_array([found]), where="here")
