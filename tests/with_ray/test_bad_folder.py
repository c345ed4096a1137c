# SPDX-License-Identifier: Apache-2.0
"""A folder of good, odd and broken files: each is captioned upright, or a row with its reason.

The fake engine's captions depend on the pixels it is given, so equal captions mean that the model
would have seen equal pixels.
"""

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import _steps
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.artifact import Ref, begin, commit, find
from sg4v_ray.core.errors import TooManyRejects
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rejects import Reject, RejectBudget
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.monitor import STATUS
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.recipes.line import CaptionStep
from sg4v_ray.sources.folder import Folder
from sg4v_ray.sources.index import IndexConfig

EXIF_ORIENTATION, TURNED = 0x0112, 6
REJECTED = {
    "cut.jpg": Reject.TRUNCATED,
    "text.png": Reject.NOT_AN_IMAGE,
    "scan.tiff": Reject.FORMAT_NOT_ALLOWED,
    "bomb.png": Reject.TOO_MANY_PIXELS,
}
SAME_PICTURE = ("upright.png", "turned.png", "palette.png", "transparent.png")


def picture() -> Image.Image:
    """Two colours, another above than below, so that up and down differ."""
    image = Image.new("RGB", (32, 32), (240, 240, 255))
    image.paste((200, 30, 30), (0, 0, 32, 10))
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    upright = picture()
    upright.save(folder / "upright.png")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED
    upright.rotate(90).save(folder / "turned.png", exif=exif)
    upright.quantize(8).save(folder / "palette.png")
    upright.convert("RGBA").save(folder / "transparent.png")
    upright.convert("CMYK").save(folder / "cmyk.jpg")
    ramp = np.linspace(0, 65535, 32, dtype=np.uint16).reshape(1, 32).repeat(32, axis=0)
    Image.fromarray(ramp).save(folder / "grey16.png")
    eight_bits = (ramp / 257).round().astype(np.uint8)
    Image.fromarray(eight_bits).save(folder / "grey8.png")
    upright.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-150])
    (folder / "text.png").write_text("I am not a picture.")
    upright.save(folder / "scan.tiff")
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    return folder


@pytest.fixture
def step(folder: Path, tmp_path: Path, tiny_model: Path) -> tuple[CaptionStep, Where]:
    """The folder recipe, with a fake engine and its captioner."""
    where = Where(root=str(tmp_path / "runs"), progress=False, engine_cpus=0.5)
    line = RECIPES["folder"]()
    index = replace(line.images[0], config=IndexConfig(sources=(Folder(path=str(folder)),)))
    _steps.index_images(index, where)
    captioner = Ref(name="fake-captioner")
    home = begin(where.storage, captioner, {})
    with hold(home) as lease:
        digests = home.upload(tiny_model, "model")
        commit(
            where.storage, captioner, config={}, inputs={}, counts={}, digests=digests, lease=lease
        )
    caption = line.caption
    assert caption is not None
    engine = EngineConfig(kind="fake", max_model_len=512)
    config = replace(
        caption.config,
        budget=RejectBudget(max_reject_rate=0.5),
        quality=QualityConfig(min_words=1),  # the fake engine writes one long word now and then
    )
    return replace(caption, engine=engine, captioner=captioner, config=config), where


@pytest.mark.usefixtures("ray_cluster")
def test_good_files_are_captioned_upright_and_bad_ones_say_why(
    step: tuple[CaptionStep, Where],
) -> None:
    manifest = _steps.caption_images(*step)
    caption, where = step
    rows = {one.id: one for one in read_rows(where.storage, caption.out, CaptionRow)}
    assert {key: one.reject for key, one in rows.items() if one.reject} == REJECTED
    assert all(rows[key].reject_detail for key in REJECTED)
    assert all(rows[key].text is None for key in REJECTED)
    good = [one for key, one in rows.items() if key not in REJECTED]
    assert len(good) == 7
    assert all(one.text for one in good)
    assert len({rows[key].text for key in SAME_PICTURE}) == 1
    assert rows["grey16.png"].text == rows["grey8.png"].text
    assert manifest.counts["rejected"] == len(REJECTED)


def status_of(artifact_dir: Storage) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(artifact_dir.get(STATUS))
    return status


@pytest.mark.usefixtures("ray_cluster")
def test_past_the_reject_budget_the_job_fails_and_keeps_the_rows(
    step: tuple[CaptionStep, Where],
) -> None:
    caption, where = step
    strict = replace(caption.config, budget=RejectBudget(max_reject_rate=0.1))
    with pytest.raises(TooManyRejects, match=r"4 of 11 rows were rejected"):
        _steps.caption_images(replace(caption, config=strict), where)
    home = where.storage.sub(caption.out.path)
    assert any(path.endswith(".parquet") for path in home.list("rows"))
    assert not home.exists("manifest.json")
    assert status_of(home)["state"] == "stopped"
    written = list(home.list("rows"))
    accepted = _steps.caption_images(caption, where)  # the same step with a larger budget
    assert accepted.counts["rejected"] == 4
    # No row was left to do: the figures are of the artifact and not of the last run.
    status = status_of(home)
    assert (status["state"], status["done"], status["queue"]) == ("finished", 11, 0)
    assert sum(status["rejected"].values()) == 4
    assert list(home.list("rows")) == written


@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_artifact_is_not_captioned_again(step: tuple[CaptionStep, Where]) -> None:
    first = _steps.caption_images(*step)
    assert _steps.caption_images(*step) == first
    caption, where = step
    assert find(where.storage, caption.out) == first
