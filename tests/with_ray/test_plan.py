# SPDX-License-Identifier: Apache-2.0
"""What the plan promises about where its steps run and how much it holds at once."""

import json
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from jobs import _steps
from jobs._bench_memory import by_process, object_store_mb
from sg4v_ray.batch import plan
from sg4v_ray.batch.plan import Flow, Work
from sg4v_ray.batch.watch import STATUS
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.rows import put_rows, read_columns
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from tests.with_ray.caption_site import CAPTIONER, make_site, processes

pytestmark = pytest.mark.usefixtures("ray_cluster")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pids:
    """Which processes a row went through."""

    id: str
    prepared: int
    worked: int
    num_tokens: int
    reject: str | None


def prepare(table: pa.Table) -> pa.Table:
    return table.select(["id"]).append_column("prepared", pa.array([os.getpid()] * len(table)))


class Worker:
    """The smallest work actor."""

    def __init__(self, *, tally: Any) -> None:
        self._tally = tally

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        size = len(batch)
        for name, values in (
            ("worked", pa.array([os.getpid()] * size)),
            ("num_tokens", pa.array([0] * size)),
            ("reject", pa.nulls(size, pa.string())),
        ):
            batch = batch.append_column(name, values)
        self._tally.finish.remote("w", [], rows=size, tokens=0, rejects=[], engine_s=0.0)
        yield batch


def send(storage: Storage, where: Where) -> None:
    """Run the plan over what the index has now."""
    home = storage.sub("out/v1")
    with hold(home) as lease:
        plan.run(
            index=storage.sub("index"),
            home=home,
            attempt=1,
            work=Work(actor=Worker, kwargs={}, prepare=prepare, record=Pids),
            flow=Flow(),
            where=where,
            lease=lease,
        )


def add_rows(storage: Storage, part: int) -> None:
    """Write 20 more rows into the index."""
    ids = range(20 * part, 20 * part + 20)
    rows = [ImageRow(id=str(n), source="s", uri="/x", size_bytes=1) for n in ids]
    put_rows(storage.sub("index"), f"part-{part}.parquet", ImageRow, rows)


@pytest.mark.filterwarnings("error::ray.util.annotations.RayDeprecationWarning")
def test_decoding_never_runs_inside_the_engines_actor(tmp_path: Path) -> None:
    # Ray would run both steps as one, as soon as they ask for the same resources.
    where = Where(root=str(tmp_path), engine_cpus=0.5, decode_cpus=0.5, progress=False)
    storage = Storage(where.root)
    add_rows(storage, 0)
    send(storage, where)
    found = read_columns(storage.sub("out/v1").sub(plan.rows_of(1)), ["prepared", "worked"])
    assert len(found) == 20
    assert all(row["prepared"] != row["worked"] for row in found.to_pylist())


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_largest_engine_that_may_start_a_job_can_also_resume_it(tmp_path: Path) -> None:
    # Ray's filter of finished rows would take a whole CPU, which a first run does not need.
    where = Where(root=str(tmp_path), engine_cpus=3.0, progress=False)  # of 4
    storage = Storage(where.root)
    for part in range(2):
        add_rows(storage, part)
        send(storage, where)
    assert len(read_columns(storage.sub("out/v1").sub(plan.rows_of(1)), ["id"])) == 40
    add_rows(storage, 2)
    with pytest.raises(ConfigError, match=r"need 4\.1 and 0\. Lower --where\.engine-cpus"):
        send(storage, replace(where, engine_cpus=3.1))


class StalledWriters:
    """Stops every write task's process as soon as it is there, as a hanging file system does."""

    def __init__(self) -> None:
        self._stopped: dict[int, psutil.Process] = {}
        self._go_on = threading.Event()
        self._thread = threading.Thread(target=self._stop, daemon=True)

    def __enter__(self) -> "StalledWriters":
        self._thread.start()
        return self

    def _stop(self) -> None:
        while not self._go_on.wait(0.02):
            for pid in processes("ray::Write", os.getpid()):
                if pid not in self._stopped:
                    self._stopped[pid] = psutil.Process(pid)
                    self._stopped[pid].suspend()

    def __exit__(self, *error: object) -> None:
        self._go_on.set()
        self._thread.join()
        for process in self._stopped.values():
            process.resume()

    def __len__(self) -> int:
        return len(self._stopped)


@pytest.mark.scale
def test_while_a_writer_hangs_the_engine_goes_on_and_memory_stays_bounded(
    tmp_path: Path, tiny_model: Path
) -> None:
    num_images, side = 12_000, 224
    site = make_site(str(tmp_path / "runs"), tmp_path, wide_model(tiny_model, side), num_images)
    step = RECIPES["demo"]().caption
    assert step is not None
    engine = EngineConfig(kind="fake", max_model_len=512, capacity=64, tokens_per_step=16)
    flow = Flow(rows_per_block=100, batch_size=50, batches_in_flight=4)
    quality = QualityConfig(min_words=1)
    config = replace(step.config, quality=quality)
    step = replace(step, config=config, engine=engine, captioner=CAPTIONER, flow=flow)
    where = Where(root=site.storage.root, engine_cpus=0.5, progress=False)
    home = site.storage.sub(step.out.path)

    def done() -> int:
        return int(json.loads(home.get(STATUS))["done"]) if home.exists(STATUS) else 0

    job = threading.Thread(target=_steps.caption_images, args=(step, where))
    pause = threading.Event()
    store_mb, uss_mb = [0.0], [0.0]
    with StalledWriters() as writers:
        job.start()
        while not writers:
            assert not pause.wait(0.1)
        at_stall = done()
        for _ in range(60):
            pause.wait(0.5)
            store_mb.append(object_store_mb())
            uss_mb.append(sum(by_process().values()))
        written, made = site.committed(), done()
    job.join()
    site.check_exactly_once()
    print(f"made {at_stall} -> {made}, written {written}")
    print(f"object store up to {max(store_mb):.0f} MB, USS {uss_mb[1]:.0f} to {max(uss_mb):.0f} MB")
    assert made - at_stall >= flow.batch_size * flow.batches_in_flight
    # What waits for the writer is text; of the images only those between two steps are held.
    made_mb = (made - at_stall) * side * side * 3 / 2**20
    assert max(store_mb) < made_mb / 4
    assert max(uss_mb[30:]) < 1.15 * max(uss_mb[:30])


def wide_model(tiny: Path, side: int) -> Path:
    """Copy what the fake engine reads of a model, with images of another size."""
    wide = tiny.parent / "wide"
    wide.mkdir()
    (wide / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    text = (tiny / "config.json").read_text().replace('"image_size": 16', f'"image_size": {side}')
    (wide / "config.json").write_text(text.replace('"patch_size": 8', '"patch_size": 32'))
    return wide
