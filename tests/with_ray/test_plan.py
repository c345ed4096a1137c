# SPDX-License-Identifier: Apache-2.0
"""What the plan promises about where its steps run and how much it holds at once."""

import asyncio
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

from jobs import _steps
from jobs._bench_memory import Watcher
from sg4v_ray.captions import in_batches
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.row_files import RowIndex, read_table
from sg4v_ray.core.rows import put_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once import plan
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.exactly_once.part_actor import PartActor
from sg4v_ray.exactly_once.plan import ActorStep, Attempt
from sg4v_ray.exactly_once.stage import Stage
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from tests.with_ray.caption_site import CAPTIONER, make_site

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


class Worker(PartActor):
    """The smallest work actor."""

    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        size = len(rows)
        for name, values in (
            ("worked", pa.array([os.getpid()] * size)),
            ("num_tokens", pa.array([0] * size)),
            ("reject", pa.nulls(size, pa.string())),
        ):
            rows = rows.append_column(name, values)
        self._progress.finish.remote("w", [], rows=size, tokens=0, rejects=[], engine_s=0.0)
        return rows


STEP = ActorStep(actor=Worker, kwargs={}, prepare=prepare, record=Pids, capacity=8)


class ReleasesRows(Worker):
    """Releases one row of each slice, and ends no slice before `STARTED` of them were started."""

    STARTED = 6

    def __init__(self, **part_actor: Any) -> None:
        self._started, self._enough = 0, asyncio.Event()
        super().__init__(**part_actor)

    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        self._started += 1
        if self._started == self.STARTED:
            self._enough.set()
        release_row()
        await self._enough.wait()
        return await super().process(rows, release_row)


class LoadsAfterDecoding(Worker):
    """Ends its load when a decode task has run."""

    def __init__(self, *, decoded: Path, **part_actor: Any) -> None:
        self._marker = decoded
        super().__init__(**part_actor)

    async def load(self) -> None:
        while not self._marker.exists():
            await asyncio.sleep(0.05)


def prepare_and_mark(table: pa.Table, *, decoded: Path) -> pa.Table:
    decoded.touch()
    return prepare(table)


def index_of(storage: Storage, rows: int) -> RowIndex:
    """Write an index of 20 rows a file."""
    records = [ImageRow(id=str(n), source="s", uri="/x", size_bytes=1) for n in range(rows)]
    files = tuple(
        put_rows(storage.sub("index"), f"{first}.parquet", ImageRow, records[first : first + 20])
        for first in range(0, rows, 20)
    )
    return RowIndex(folder=storage.sub("index"), files=files)


def send(
    storage: Storage,
    where: Where,
    rows: int,
    *,
    name: str = "out",
    step: ActorStep = STEP,
) -> list[dict[str, Any]]:
    """Run the plan over an index, and return its rows."""
    artifact_dir = storage.sub(f"{name}/v1")
    attempt = Attempt(
        artifact_dir=artifact_dir, number=1, index=index_of(storage, rows), identity="test"
    )
    with hold(artifact_dir) as lease:
        checked, _ = plan.run(
            attempt, step=step, batching=Batching(rows_per_part=8), where=where, lease=lease
        )
    tables = [read_table(attempt.out, file.path, None) for file in checked.files]
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.filterwarnings("error::ray.util.annotations.RayDeprecationWarning")
def test_decoding_never_runs_inside_the_engines_actor(tmp_path: Path) -> None:
    where = Where(root=str(tmp_path), engine_cpus=0.5, decode_cpus=0.5, progress=False)
    found = send(Storage(where.root), where, 20)
    assert [row["id"] for row in found] == [str(n) for n in range(20)]
    assert all(row["prepared"] != row["worked"] for row in found)


def test_rows_are_decoded_while_the_last_rows_of_a_slice_are_in_process(tmp_path: Path) -> None:
    # Capacity 4: 8 rows in 4 slices of 2 are in flight. One released row of each slice makes room
    # for 2 more slices; whole slices would wait for each other indefinitely.
    where = Where(root=str(tmp_path), engine_cpus=0.5, progress=False, max_actors=1)
    step = replace(STEP, actor=ReleasesRows, capacity=4)
    assert len(send(Storage(where.root), where, 40, step=step)) == 40


def test_the_first_rows_are_decoded_while_the_engine_loads(tmp_path: Path) -> None:
    where = Where(root=str(tmp_path), engine_cpus=0.5, progress=False, max_actors=1)
    decoded = tmp_path / "decoded"
    step = replace(
        STEP,
        actor=LoadsAfterDecoding,
        kwargs={"decoded": decoded},
        prepare=functools.partial(prepare_and_mark, decoded=decoded),
    )
    assert len(send(Storage(where.root), where, 20, step=step)) == 20


def prepare_or_crash(table: pa.Table) -> pa.Table:
    """Return reject columns of an image, or end the process as a decoder with a fault does."""
    if "7" in table["id"].to_pylist() and table["uri"][0].as_py() == "/x":
        os._exit(1)
    rejects = [None if uri == "/x" else "missing" for uri in table["uri"].to_pylist()]
    prepared = prepare(table).append_column("reject", pa.array(rejects, pa.string()))
    return prepared.append_column("reject_detail", pa.nulls(len(table), pa.string()))


class KeepsRejects(Worker):
    """Keeps the rejects of the decode step."""

    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        reject = rows["reject"]
        rows = await super().process(rows.drop_columns(["reject"]), release_row)
        return rows.set_column(rows.column_names.index("reject"), "reject", reject)


def test_an_image_that_crashes_the_decode_process_is_rejected_alone(tmp_path: Path) -> None:
    where = Where(root=str(tmp_path), engine_cpus=0.5, progress=False, max_actors=1)
    step = replace(STEP, actor=KeepsRejects, prepare=prepare_or_crash, capacity=4)
    rejects = {row["id"]: row["reject"] for row in send(Storage(where.root), where, 8, step=step)}
    assert rejects == {str(n): "corrupt" if n == 7 else None for n in range(8)}


@pytest.mark.scale
def test_an_image_that_crashes_the_decode_process_is_left_out_of_batches_alone(
    tmp_path: Path,
) -> None:
    stage = cast(Stage, SimpleNamespace(index=index_of(Storage(str(tmp_path)), 8)))
    where = Where(root=str(tmp_path), progress=False)
    tables = in_batches._prepared(stage, prepare_or_crash, where, rows_per_task=4)
    rejects = {row["id"]: row["reject"] for table in tables for row in table.to_pylist()}
    assert rejects == {str(n): "corrupt" if n == 7 else None for n in range(8)}


@pytest.mark.timeout(300)
def test_the_largest_engine_leaves_room_for_one_decode_task(tmp_path: Path) -> None:
    where = Where(root=str(tmp_path), engine_cpus=3.5, progress=False)  # of 4
    assert len(send(Storage(where.root), where, 40)) == 40
    with pytest.raises(ConfigError, match=r"need 4\.1 and 0\. Lower --where\.engine-cpus"):
        send(Storage(where.root), replace(where, engine_cpus=3.6), 40, name="other")


def test_decoded_images_of_at_most_twice_the_capacity_are_held(
    tmp_path: Path, tiny_model: Path
) -> None:
    num_images, side, capacity = 240, 448, 16
    site = make_site(str(tmp_path / "runs"), tmp_path, wide_model(tiny_model, side), num_images)
    step = RECIPES["demo"]().caption
    assert step is not None
    engine = EngineConfig(kind="fake", max_model_len=512, capacity=capacity, latency_s=0.01)
    batching = Batching(rows_per_part=80, rows_per_task=8)
    config = replace(step.config, quality=QualityConfig(min_words=1))
    step = replace(step, config=config, engine=engine, captioner=CAPTIONER, batching=batching)
    where = Where(root=site.storage.root, engine_cpus=0.5, progress=False)
    with Watcher(every_s=0.1) as memory:
        _steps.caption_images(step, where)
    site.check_exactly_once()
    held = max(store_mb for _, _, store_mb in memory.samples) * 2**20 / (side * side * 3)
    # A slice of rows is in the store twice for a moment: as a result and while it is written.
    assert 0 < held <= 2 * capacity + 2 * batching.rows_per_task


def wide_model(tiny: Path, side: int) -> Path:
    """Copy what the fake engine reads of a model, with images of another size."""
    wide = tiny.parent / "wide"
    wide.mkdir()
    (wide / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    text = (tiny / "config.json").read_text().replace('"image_size": 16', f'"image_size": {side}')
    (wide / "config.json").write_text(text.replace('"patch_size": 8', '"patch_size": 32'))
    return wide
