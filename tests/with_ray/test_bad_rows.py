# SPDX-License-Identifier: Apache-2.0
"""One bad image never costs more than its own row, and can be tried again."""

import io
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from jobs import _steps
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.errors import (
    ArtifactCorrupt,
    ArtifactDrift,
    ArtifactMissing,
    ConfigError,
    TooManyRejects,
)
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import CaptionRow, ImageRow
from sg4v_ray.core.rejects import Reject, RejectBudget
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.verify import manifest_names, verify
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.recipes.line import CaptionStep
from tests.with_ray.caption_site import CAPTIONER, finish, write_index

pytestmark = pytest.mark.usefixtures("ray_cluster")

POISON = 251


@pytest.fixture
def where(tmp_path: Path, tiny_model: Path) -> Where:
    """A root with a captioner for the fake engine."""
    storage = Storage(str(tmp_path / "runs"))
    finish(storage, CAPTIONER, digests=storage.upload(tiny_model, f"{CAPTIONER.path}/model"))
    return Where(root=storage.root, engine_cpus=0.5, progress=False)


def captioning(*, max_reject_rate: float = 0.9, poison: int | None = None) -> CaptionStep:
    """The demo's captioning with a fake engine, which takes its time so that rows share it."""
    step = RECIPES["demo"]().caption
    assert step is not None
    config = replace(
        step.config,
        generate=replace(step.config.generate, cut_off="keep"),
        budget=RejectBudget(max_reject_rate=max_reject_rate),
        quality=QualityConfig(min_words=1),
        images=ImageLimits(max_bytes=200_000, max_pixels=1_000_000),
    )
    engine = EngineConfig(kind="fake", max_model_len=512, capacity=8, latency_s=0.01, poison=poison)
    batching = Batching(rows_per_part=50, rows_per_task=8)
    return replace(step, config=config, engine=engine, captioner=CAPTIONER, batching=batching)


def index(where: Where, files: list[Path]) -> None:
    rows = [
        ImageRow(id=file.name, source="s", uri=str(file), size_bytes=1) for file in sorted(files)
    ]
    write_index(where.storage, rows)


def plain(file: Path, level: int) -> Path:
    Image.new("RGB", (16, 16), (level, level, level)).save(file)
    return file


def captions(where: Where, step: CaptionStep) -> dict[str, CaptionRow]:
    return {one.id: one for one in read_rows(where.storage, step.out, CaptionRow)}


def test_an_image_that_kills_the_engine_is_found_out_and_costs_no_other(
    where: Where, tmp_path: Path
) -> None:
    files = [plain(tmp_path / f"{n:03d}.png", POISON if n == 17 else n) for n in range(40)]
    index(where, files)
    step = captioning(poison=POISON)
    _steps.caption_images(step, where)
    rows = captions(where, step)
    assert {key: row.reject for key, row in rows.items() if row.reject} == {
        "017.png": Reject.CRASHES_ENGINE
    }
    assert len(rows) == len(files)


def test_rejects_are_tried_again_by_reason_and_the_newest_answer_counts(
    where: Where, tmp_path: Path
) -> None:
    files = [plain(tmp_path / f"{n}.png", n) for n in range(5)]
    index(where, files)
    files[1].unlink()
    files[2].write_text("I am not a picture.")
    step = captioning()
    with pytest.raises(ArtifactMissing):
        _steps.retry_rejects(step, (), where)
    first = _steps.caption_images(step, where)
    assert first.counts["rejected"] == 2
    plain(files[1], 1)
    with pytest.raises(ConfigError, match="no such reject reason: gone; there are missing"):
        _steps.retry_rejects(step, ("gone",), where)
    with pytest.raises(ConfigError, match="has no row rejected for truncated"):
        _steps.retry_rejects(step, ("truncated",), where)
    second = _steps.retry_rejects(step, ("missing",), where)
    assert second.attempts == ("rows/attempt-0001", "rows/attempt-0002")
    assert second.counts["rows"] == 5
    assert second.counts["rejected"] == 1
    assert second.fingerprint != first.fingerprint
    assert second.metrics == first.metrics  # how fast the job was, not the retry of a row
    assert _steps.retry_rejects(step, ("missing",), where) == second  # as after a lost exit code
    rows = captions(where, step)
    assert rows["1.png"].text
    assert rows["2.png"].reject == Reject.NOT_AN_IMAGE
    assert _steps.caption_images(step, where) == second  # finished: opened and not made again
    strict = replace(step, config=replace(step.config, budget=RejectBudget(max_reject_rate=0)))
    third = _steps.retry_rejects(strict, ("not_an_image",), where)  # a retry has no budget
    assert third.counts["rejected"] == 1

    # Without a copy of a lost part: the advice of `verify`.
    folder = where.storage.sub(step.out.path)
    folder.delete("rows/attempt-0001/part-000000.parquet")
    with pytest.raises(ArtifactCorrupt, match=r"delete the damaged row files and each manifest"):
        verify(where.storage, step.out)
    with pytest.raises(ArtifactCorrupt, match=r"part-000000.parquet is missing. .* jobs.verify"):
        captions(where, step)
    for name in manifest_names(where.storage, step.out):
        folder.delete(name)
    files[1].unlink()  # the lost rows are made again from the same images
    _steps.caption_images(step, where)
    for reason in ("missing", "not_an_image"):
        _steps.retry_rejects(step, (reason,), where)
    assert verify(where.storage, step.out).counts == third.counts


def test_rows_that_were_added_to_an_index_made_again_are_not_left_out_silently(
    where: Where, tmp_path: Path
) -> None:
    files = [plain(tmp_path / f"{n}.png", n) for n in range(3)]
    index(where, files[:2])
    step = captioning()
    _steps.caption_images(step, where)
    where.storage.delete(step.images.path)
    index(where, files)
    for again in (
        lambda: _steps.caption_images(step, where),
        lambda: _steps.retry_rejects(step, (), where),
    ):
        with pytest.raises(
            ArtifactDrift, match=r"made from other rows than .*/test-images/v1 has now"
        ):
            again()


def test_a_retry_may_raise_a_limit_and_records_it(where: Where, tmp_path: Path) -> None:
    Image.new("RGB", (1200, 1000)).save(tmp_path / "large.png")
    index(where, [tmp_path / "large.png", plain(tmp_path / "small.png", 3)])
    step = captioning()
    assert _steps.caption_images(step, where).counts["rejected_too_many_pixels"] == 1
    images = replace(step.config.images, max_pixels=2_000_000)
    higher = replace(step, config=replace(step.config, images=images))
    with pytest.raises(ArtifactDrift, match=r"max_pixels: 1000000 there, 2000000 here"):
        _steps.caption_images(higher, where)
    other = replace(higher, config=replace(higher.config, geometry="square"))
    with pytest.raises(ArtifactDrift, match=r"geometry.*may raise limits \(max_"):
        _steps.retry_rejects(other, (), where)
    few = replace(step, config=replace(step.config, images=replace(images, max_pixels=9)))
    with pytest.raises(ConfigError, match=r"max_pixels is 9, .* with 1000000; a retry may raise"):
        _steps.retry_rejects(few, (), where)
    done = _steps.retry_rejects(higher, ("too_many_pixels",), where)
    assert done.counts["rejected"] == 0
    limits = {"captions.images.max_pixels": 2_000_000}
    assert done.raised_limits == {"rows/attempt-0002": limits}
    assert {row.reject for row in captions(where, step).values()} == {None}
    assert _steps.caption_images(step, where) == done


def good_bytes(rng: random.Random, kind: str) -> bytes:
    """Encode a picture with enough detail that its file has some kilobytes."""
    noise = Image.effect_noise((96, 64), 80).convert("RGB").resize((192, 128))
    noise.putpixel((0, 0), (rng.randrange(256), 0, 0))
    out = io.BytesIO()
    noise.save(out, kind)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc


def mutated(rng: random.Random, way: str) -> bytes:
    """Return real image bytes spoiled in one way."""
    if way == "tiff":
        return good_bytes(rng, "TIFF")
    if way == "broken_chunk":
        png = good_bytes(rng, "PNG")
        return png[:60] + rng.randbytes(200) + png[260:]
    data = good_bytes(rng, rng.choice(("PNG", "JPEG", "WEBP")))
    half = rng.randrange(len(data) // 4, len(data) // 2)
    ways: dict[str, Callable[[], bytes]] = {  # called, for some take long
        "none": lambda: data,
        "flipped_bits": lambda: bytes(b ^ (rng.random() < 0.002) << rng.randrange(8) for b in data),
        "empty": lambda: b"",
        "cut": lambda: data[:half],
        "other_bytes": lambda: rng.randbytes(400),
        "huge_header": lambda: png_header(
            rng.randrange(5_000, 60_000), rng.randrange(5_000, 60_000)
        ),
        "too_long": lambda: data + bytes(200_001),
        "zeroed": lambda: data[:12] + bytes(len(data) - 12),
    }
    return ways[way]()


BAD_WAYS = ("empty", "cut", "other_bytes", "tiff", "huge_header", "too_long", "broken_chunk")
ODD_WAYS = ("none", "flipped_bits", "zeroed")


def test_500_mutated_images_each_get_a_row_and_every_reason_occurs(
    where: Where, tmp_path: Path
) -> None:
    rng = random.Random(11)
    ways = [rng.choice(BAD_WAYS) for _ in range(400)] + [rng.choice(ODD_WAYS) for _ in range(95)]
    files = []
    for number, way in enumerate(ways):
        files.append(tmp_path / f"{number:03d}-{way}.img")
        files[-1].write_bytes(mutated(rng, way))
    index(where, [*files, *(tmp_path / f"gone-{n}.png" for n in range(5))])
    step = captioning(max_reject_rate=0.5)
    with pytest.raises(TooManyRejects, match=r"of 500 rows were rejected .* Commonest: \d+ \w+"):
        _steps.caption_images(step, where)
    budget = RejectBudget(max_reject_rate=0.99)
    manifest = _steps.caption_images(
        replace(step, config=replace(step.config, budget=budget)), where
    )
    rows = captions(where, step)
    assert len(rows) == 500
    assert all((row.text is None) != (row.reject is None) for row in rows.values())
    reasons = Counter(row.reject for row in rows.values() if row.reject)
    assert set(reasons) == {
        Reject.MISSING,
        Reject.EMPTY_FILE,
        Reject.TOO_MANY_BYTES,
        Reject.NOT_AN_IMAGE,
        Reject.FORMAT_NOT_ALLOWED,
        Reject.TOO_MANY_PIXELS,
        Reject.TRUNCATED,
        Reject.CORRUPT,
    }
    assert manifest.counts["rejected"] == reasons.total() >= 400
    assert all(rows[file.name].text for file in files if file.stem.endswith("none"))
