# SPDX-License-Identifier: Apache-2.0
"""Bench: driver memory, start and commit of a captioning job over an index of 20,000,000 rows.

python -m jobs.bench_plan [--rows 20000000] [--done 19000000] [--root FOLDER] [flags]

The index and the parts of its first rows are generated. The public job makes the other rows; it is
killed twice on the way. Then the same at 1,000,000 rows. Prints a JSON line for each run, a table,
and last the ratios.
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from jobs._bench_run import empty, killable_job
from jobs._cli import main, parse
from sg4v_ray.captions import bulk
from sg4v_ray.core.artifact import MANIFEST, Ref, begin, commit, find, identity, software_versions
from sg4v_ray.core.errors import ConfigError, Sg4vError
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import CaptionRow, ImageRow, schema
from sg4v_ray.core.row_files import (
    ROWS_PER_INDEX_FILE,
    RowFile,
    RowIndex,
    hash_ids,
    put_table,
    read_table,
)
from sg4v_ray.core.rows import ROWS
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.text_table import text_table
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.parts import (
    Part,
    PartFooter,
    encode_part,
    figures_of,
    part_name,
    split_into_parts,
)
from sg4v_ray.exactly_once.plan import attempt_folder
from sg4v_ray.exactly_once.stage import Stage
from sg4v_ray.recipes import embedded
from sg4v_ray.recipes.line import CaptionStep
from sg4v_ray.sources.easy_vqa import EasyVqaImages

T = TypeVar("T")
R = TypeVar("R")

RATIOS: Final = "ratios.json"
IMAGES: Final = Ref(name="plan-images")
CAPTIONS: Final = Ref(name="captions")
_RECIPE: Final = "demo"
_KILLS: Final = 2
_NOT_JUDGED: Final = 1_000_000
_SPLITS: Final[tuple[Literal["train"], Literal["test"]]] = ("train", "test")
_BYTES_PER_ROW: Final = 60
"""Disk for a row of the index and of a part, measured and rounded up."""
_CAPTION: Final = "The picture shows a shape in one colour before a plain background, number "


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Sizes of the two runs."""

    rows: int = 20_000_000
    """Rows of the large index."""
    done: int = 19_000_000
    """Rows of the large index whose parts are generated before the job starts."""
    small_rows: int = 1_000_000
    """Rows of the small index."""
    small_done: int = 0
    """Rows of the small index whose parts are generated before the job starts."""
    rows_per_part: int = 2_000
    parts_before_kill: int = 20
    """New parts after which the job is killed, twice in each run."""
    root: str = str(Path("runs/bench-plan").absolute())
    """Local folder: a new one, or one that an earlier bench filled, which is emptied first."""

    def __post_init__(self) -> None:
        if ROWS_PER_INDEX_FILE % self.rows_per_part:
            raise ConfigError(f"rows_per_part must divide {ROWS_PER_INDEX_FILE:,}")
        for rows, done in ((self.rows, self.done), (self.small_rows, self.small_done)):
            if done % self.rows_per_part:
                raise ConfigError(f"done must be a multiple of rows_per_part, got {done}")
            if rows - done < 2 * self.parts_before_kill * self.rows_per_part:
                raise ConfigError(f"{rows - done} rows are left: too few to be killed twice")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRun:
    """Figures of one index, over three starts of the job."""

    rows: int
    done: int
    """Rows with a part before the first start."""
    first_part_s: tuple[float, ...]
    """Seconds from the start of the process to the first new part object, for each start."""
    peak_mb: tuple[float, ...]
    """Peak resident memory of the driver process in MB, for each start."""
    commit_s: float
    """Seconds from the last part object to the manifest."""
    rows_per_s: float
    """New rows by the seconds of the last start, up to the last part."""
    manifest_mb: float
    write_s: float
    """Seconds to generate index and parts."""


def job_flags(root: Path, rows_per_part: int) -> list[str]:
    """Return the command line of the captioning job: a recipe and its flags."""
    flags: dict[str, object] = {
        "images.name": IMAGES.name,
        "out.name": CAPTIONS.name,
        "engine.kind": "fake",
        "engine.capacity": 512,
        "engine.max-model-len": 512,
        "engine.tokens-per-step": 64,
        "batching.rows-per-part": rows_per_part,
        "batching.rows-per-task": 125,
        # A fake's captions are not judged: they are as long and as odd as they come.
        "config.generate.generation.max-tokens": 200,
        "config.quality.min-words": 1,
        "config.quality.max-phrase-repeats": _NOT_JUDGED,
        "config.quality.max-word-run": _NOT_JUDGED,
        "where.root": root,
    }
    return [_RECIPE, *(f"--{key}={value}" for key, value in flags.items()), "--where.no-progress"]


def check_disk(bench: Bench, root: Path) -> None:
    """Raise ConfigError if the disk below `root` has too little space."""
    needed = (bench.rows + bench.small_rows) * _BYTES_PER_ROW
    if (free := shutil.disk_usage(root).free) < needed:
        raise ConfigError(
            f"the bench needs {needed / 1e9:.1f} GB below {root}, which has {free / 1e9:.1f} GB; "
            "name a folder on another disk with --root, or lower --rows and --done"
        )


def in_processes(work: Callable[[T], R], items: Iterable[T], processes: int) -> list[R]:
    """Apply a function to items in some processes, 1 is this one; keep their order."""
    if processes == 1:
        return list(map(work, items))
    # Spawned: obstore's threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(work, items))


def picture_uris(storage: Storage) -> tuple[list[str], list[int]]:
    """Copy easy-VQA's 5,000 images below a root; return their URIs and sizes."""
    found = [
        row
        for split in _SPLITS
        for row in EasyVqaImages(split=split, name=split).rows(storage.sub(f"easy-vqa/{split}"))
    ]
    return [row.uri for row in found], [row.size_bytes for row in found]


def index_table(first: int, rows: int, uris: list[str], sizes: list[int]) -> pa.Table:
    """Return index rows `first` and following, with ids as those of a collection of URLs."""
    numbers = np.arange(first, first + rows)
    places = numbers % len(uris)
    shards = pc.utf8_lpad(pa.array(numbers // 10_000).cast(pa.string()), 5, "0")
    members = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 9, "0")
    columns = {
        "id": pc.binary_join_element_wise(shards, members, "/"),
        "source": pa.repeat("plan", rows),
        "uri": pa.array(uris).take(pa.array(places)),
        "size_bytes": pa.array(np.asarray(sizes)[places]),
    }
    return pa.table(columns).select(schema(ImageRow).names).cast(schema(ImageRow))


def write_index_file(
    number: int, *, folder: Storage, rows: int, uris: list[str], sizes: list[int]
) -> RowFile:
    """Write one file of an index of `rows` rows."""
    first = number * ROWS_PER_INDEX_FILE
    table = index_table(first, min(ROWS_PER_INDEX_FILE, rows - first), uris, sizes)
    return put_table(folder, f"{ROWS}/part-{number:05d}.parquet", table)


def write_index(storage: Storage, rows: int, processes: int) -> None:
    """Write and commit an index of `rows` rows that go round easy-VQA's images."""
    uris, sizes = picture_uris(storage)
    folder = begin(storage, IMAGES, {})
    write = partial(write_index_file, folder=folder, rows=rows, uris=uris, sizes=sizes)
    numbers = range(-(-rows // ROWS_PER_INDEX_FILE))
    files = tuple(in_processes(write, numbers, processes))
    with hold(folder) as lease:
        commit(
            storage, IMAGES, config={}, inputs={}, counts={"rows": rows}, attempts=(ROWS,),
            files=files, lease=lease,
        )  # fmt: skip


def caption_table(rows: pa.Table, first: int) -> pa.Table:
    """Return a good caption row for each index row."""
    count = len(rows)
    numbers = pa.array(np.arange(first, first + count)).cast(pa.string())
    columns = {
        "id": rows["id"],
        "source": rows["source"],
        "uri": rows["uri"],
        "text": pc.binary_join_element_wise(_CAPTION, numbers, ""),
        "num_tokens": pa.repeat(20, count),
        "finish_reason": pa.repeat("stop", count),
        "reject": pa.nulls(count),
        "reject_detail": pa.nulls(count),
    }
    return pa.table(columns).select(schema(CaptionRow).names).cast(schema(CaptionRow))


@dataclass(frozen=True, kw_only=True, slots=True)
class PartWriter:
    """Writes the parts of index files as the actors of a job do, without a model."""

    index: RowIndex
    index_sha256: str
    out: Storage
    identity: str

    def __call__(self, parts: list[Part]) -> None:
        """Write parts of one index file."""
        file = self.index.files[parts[0].file]
        table = read_table(self.index.folder, file.path, None)
        software = software_versions()
        for part in parts:
            rows = table.slice(part.first, part.rows)
            captions = caption_table(rows, part.number * part.rows)
            footer = PartFooter(
                part=part.number,
                writer=uuid.uuid4().hex,
                identity=self.identity,
                index_sha256=self.index_sha256,
                ids_sha256=hash_ids(rows["id"]),
                figures=figures_of(captions),
                software=software,
            )
            self.out.put(part_name(part.number), encode_part(captions, footer))


def write_parts(flags: list[str], rows_per_part: int, done: int, processes: int) -> PartWriter:
    """Write the parts of the first `done` rows of the job with these flags."""
    step, where = parse(__doc__, lambda line: line.caption, flags)
    embedded.install_captioner(where.storage)
    stage = _stage(step, where)
    parts = [
        one
        for one in split_into_parts(stage.index, rows_per_part)
        if one.number < done // rows_per_part
    ]
    write = PartWriter(
        index=stage.index,
        index_sha256=stage.index.sha256,
        out=where.storage.sub(f"{CAPTIONS.path}/{attempt_folder(1)}"),
        identity=identity(stage.identity, stage.inputs),
    )
    per_file = ROWS_PER_INDEX_FILE // rows_per_part
    files = [parts[at : at + per_file] for at in range(0, len(parts), per_file)]
    in_processes(write, files, processes)
    return write


def _stage(step: CaptionStep, where: Where) -> Stage:
    return bulk.stage_of(
        step.config,
        engine=step.engine,
        images=step.images,
        captioner=step.captioner,
        out=step.out,
        where=where,
    )


def measure(bench: Bench, root: Path, *, rows: int, done: int) -> PlanRun:
    """Generate an index and the parts of its first rows; kill the job twice, then let it finish."""
    storage, flags = Storage(str(root)), job_flags(root, bench.rows_per_part)
    started_s = time.monotonic()
    processes = os.cpu_count() or 1
    write_index(storage, rows, processes)
    write_parts(flags, bench.rows_per_part, done, processes)
    write_s = time.monotonic() - started_s
    print(json.dumps({"part": "generated", "rows": rows, "seconds": round(write_s, 1)}), flush=True)
    argv = [sys.executable, "-m", "jobs.caption_images", *flags]
    folder = root / CAPTIONS.path / attempt_folder(1)
    manifest = root / CAPTIONS.path / MANIFEST
    starts = []
    for _ in range(_KILLS):
        with killable_job(argv, folder) as job:
            job.wait_for_parts(bench.parts_before_kill)
            job.kill()
        starts.append(job)
    with killable_job(argv, folder) as last:
        committed_s = last.wait_for(manifest)
        last.finish()
    _check_rows(storage, rows)
    return PlanRun(
        rows=rows,
        done=done,
        first_part_s=tuple(round(one.first_part_s or 0.0, 1) for one in (*starts, last)),
        peak_mb=tuple(round(one.peak_mb, 1) for one in (*starts, last)),
        commit_s=round(committed_s - last.last_part_s, 1),
        rows_per_s=round(last.new_parts * bench.rows_per_part / last.last_part_s, 1),
        manifest_mb=round(manifest.stat().st_size / 1e6, 2),
        write_s=round(write_s, 1),
    )


def _check_rows(storage: Storage, rows: int) -> None:
    found = find(storage, CAPTIONS).counts["rows"]
    if found != rows:
        raise Sg4vError(f"the manifest counts {found} rows, the index has {rows}")


def ratios_of(large: PlanRun, small: PlanRun) -> dict[str, float]:
    """Return the figures that have limits."""
    large_mb, small_mb = max(large.peak_mb), max(small.peak_mb)
    return {
        "driver_peak_mb": large_mb,
        "driver_peak_over_small": round(large_mb / small_mb, 3),
        "first_part_s": max(large.first_part_s),
        "commit_s": large.commit_s,
    }


def _table(runs: Iterable[PlanRun]) -> str:
    names = [field.name for field in fields(PlanRun)]
    columns = [[str(value) for value in asdict(run).values()] for run in runs]
    return text_table([("figure", *("run",) * len(columns)), *zip(names, *columns, strict=True)])


def run() -> None:
    """Run the bench with the flags of this process."""
    bench = tyro.cli(Bench, description=__doc__)
    root = Path(bench.root).absolute()
    empty(root)
    check_disk(bench, root)
    large = measure(bench, root / "large", rows=bench.rows, done=bench.done)
    print(json.dumps({"part": "large", **asdict(large)}), flush=True)
    small = measure(bench, root / "small", rows=bench.small_rows, done=bench.small_done)
    print(json.dumps({"part": "small", **asdict(small)}), flush=True)
    print(_table((large, small)))
    ratios = ratios_of(large, small)
    last = json.dumps({"case": "ratios", **ratios, "rows": bench.rows, "done": bench.done})
    (root / RATIOS).write_text(f"{last}\n")
    print(last, flush=True)


if __name__ == "__main__":
    main(run, stopped="nothing was measured, a bench starts again from nothing")
