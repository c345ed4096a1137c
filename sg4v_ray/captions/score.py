# SPDX-License-Identifier: Apache-2.0
"""Score finished captions: how well each fits its image, and what each image looks like.

captions@v, evaluation images@v -> decode, hash -> CLIP actors -> caption-scores@v

Nothing is removed here: a `CaptionFilter` decides that when a dataset is built.
"""

import asyncio
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sg4v_ray.core.artifact import Manifest, Ref, find
from sg4v_ray.core.config import content_of, fingerprint
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.images import ImageLimits, Rejected, open_image
from sg4v_ray.core.records import ScoreRow
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.row_files import RowIndex, open_index, write_index
from sg4v_ray.core.rows import rows_by_file
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.exactly_once.part_actor import PartActor, without_images
from sg4v_ray.exactly_once.pixels import read_images
from sg4v_ray.exactly_once.plan import ActorStep
from sg4v_ray.exactly_once.stage import Stage, input_fingerprints, write_rows
from sg4v_ray.inference.clip_config import ClipConfig
from sg4v_ray.model.geometry import as_model_sees

if TYPE_CHECKING:  # torch: the driver does without
    from sg4v_ray.inference.clip import Clip

_ROWS_AT_ONCE: Final = 32
"""Rows of one actor at once: the CLIP model takes one slice after another."""
_INDEX = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("text", pa.string()),
        pa.field("is_caption", pa.bool_()),
    ]
)


@identity_keys(
    "ScoreConfig",
    excluded=("fetch", "budget"),
    clip="clip",
    evaluation_images="evaluation_images",
    images="images",
    fetch="fetch",
    budget="budget",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """What captions are scored with, and what their images are compared with."""

    clip: ClipConfig
    evaluation_images: tuple[Ref, ...] = ()
    """Indexes of images that no training data may contain; they are hashed too."""
    images: ImageLimits = ImageLimits()
    fetch: FetchConfig = FetchConfig()
    budget: RejectBudget = RejectBudget()


def run(
    config: ScoreConfig, *, captions: Ref, out: Ref, batching: Batching, where: Where
) -> Manifest:
    """Score the captions of a finished artifact; open the scores if they are finished.

    Raises:
        ArtifactMissing: the captions or an evaluation index are not finished.
        ConfigError: the CLIP model or its weights are not there.
    """
    config.clip.check()
    storage = where.storage
    inputs = input_fingerprints(storage, captions, *config.evaluation_images)
    # Named by its inputs: other captions get another index beside it.
    folder = storage.sub(f"{out.path}/index-{fingerprint(inputs)}")
    index = open_index(folder) or _write_index(storage, folder, captions, config.evaluation_images)
    kwargs = {"clip": config.clip, "threads": where.engine_threads}
    step = ActorStep(
        actor=Score,
        kwargs=kwargs,
        prepare=partial(
            prepare, limits=config.images, fetch=config.fetch, size=config.clip.image_size
        ),
        record=ScoreRow,
        capacity=_ROWS_AT_ONCE,
    )
    stage = Stage(
        out=out,
        identity={"scores": content_of(config)},
        inputs=inputs,
        index=index,
        step=lambda attempt: step,
        budget=config.budget,
    )
    return write_rows(stage, batching=batching, where=where)


def _write_index(
    storage: Storage, folder: Storage, captions: Ref, evaluation_images: tuple[Ref, ...]
) -> RowIndex:
    """Write one row for each caption and each evaluation image."""

    def tables() -> Iterator[pa.Table]:
        for ref in (captions, *evaluation_images):
            manifest = find(storage, ref)
            columns = ["uri", "text", "reject"] if ref == captions else ["uri"]
            for table in rows_by_file(storage.sub(ref.path), manifest, columns):
                yield _index_rows(table, ref, is_caption=ref == captions)

    return write_index(folder, tables())


def _index_rows(table: pa.Table, ref: Ref, *, is_caption: bool) -> pa.Table:
    if is_caption:
        table = table.filter(pc.is_null(table["reject"]))
    ids = table["id"] if is_caption else pc.binary_join_element_wise(f"{ref}", table["id"], "/")
    texts = table["text"] if is_caption else pa.nulls(len(table), pa.string())
    columns = [ids, table["uri"], texts, pa.array([is_caption] * len(table), pa.bool_())]
    return pa.table(columns, schema=_INDEX)


def prepare(table: pa.Table, *, limits: ImageLimits, fetch: FetchConfig, size: int) -> pa.Table:
    """Add each image's perceptual hash and, of a captioned one, the square that CLIP sees.

    Padded and not cropped as CLIP's own: a caption speaks of the borders too.
    """
    rows: list[dict[str, Any]] = []
    found = read_images(table["uri"].to_pylist(), limits=limits, fetch=fetch)
    for data, is_caption in zip(found, table["is_caption"].to_pylist(), strict=True):
        image = data if isinstance(data, Rejected) else open_image(data, limits)
        row = dict.fromkeys(("image", "phash", "reject", "reject_detail"))
        if isinstance(image, Rejected):
            row |= {"reject": image.reason.value, "reject_detail": image.detail}
        else:
            row["phash"] = str(imagehash.phash(image))
            row["image"] = as_model_sees(image, size, "pad").tobytes() if is_caption else None
        rows.append(row)
    columns = {
        "phash": pa.string(),
        "image": pa.large_binary(),
        "reject": pa.string(),
        "reject_detail": pa.string(),
    }
    for name, kind in columns.items():
        table = table.append_column(name, pa.array([row[name] for row in rows], kind))
    return table.drop_columns(["uri"])


class Score(PartActor):
    """Work actor with one CLIP model."""

    def __init__(self, *, clip: ClipConfig, threads: int, **part_actor: Any) -> None:
        self._config, self._threads = clip, threads
        self._one_at_a_time = threading.Lock()
        super().__init__(**part_actor)

    async def load(self) -> None:
        """Load the CLIP model."""

        def open_clip() -> "Clip":
            from sg4v_ray.inference.clip import Clip

            return Clip(self._config, threads=self._threads)

        self._clip = await asyncio.to_thread(open_clip)

    async def process(self, rows: pa.Table, release_row: Callable[[], None]) -> pa.Table:
        """Score every row that has a caption and an image."""
        plain = rows.select(["image", "text"]).to_pylist()
        rows = without_images(rows)
        scored = [place for place, row in enumerate(plain) if row["image"] is not None]
        scores = await asyncio.to_thread(self._scores, [plain[place] for place in scored])
        by_row: list[list[float] | None] = [None] * len(plain)
        for place, found in zip(scored, scores, strict=True):
            by_row[place] = found
        rejects = [one for one in rows["reject"].to_pylist() if one is not None]
        self._progress.finish.remote(
            self._name, [], rows=len(plain), tokens=0, rejects=rejects, engine_s=0.0
        )
        mean = [None if one is None else statistics.fmean(one) for one in by_row]
        worst = [None if one is None else min(one) for one in by_row]
        table = rows.select(["id", "is_caption", "phash"])
        table = table.append_column("clip_score", pa.array(mean, pa.float64()))
        table = table.append_column("worst_clip_score", pa.array(worst, pa.float64()))
        for name in ("reject", "reject_detail"):
            table = table.append_column(name, rows[name])
        return table

    def _scores(self, rows: list[dict[str, Any]]) -> list[list[float]]:
        if not rows:
            return []
        side = self._config.image_size
        images = [np.frombuffer(row["image"], np.uint8).reshape(side, side, 3) for row in rows]
        with self._one_at_a_time:
            return self._clip.score(images, [self._clip.pieces(row["text"]) for row in rows])
