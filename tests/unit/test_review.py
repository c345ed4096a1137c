# SPDX-License-Identifier: Apache-2.0
"""People read a hold-out of each source, and nothing that they read is trained on."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from sg4v_ray.analysis.review import IDS, PAGE, write_review
from sg4v_ray.captions.prompts import prompt
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import Sample, TeacherCaptionRow, from_table
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.core.where import Where
from sg4v_ray.dataset.build import BuildConfig, CaptionsPart, run
from tests.row_artifacts import finish_rows
from tests.teacher.desk_site import picture

pytestmark = pytest.mark.teacher

CAPTIONS, DATA = Ref(name="teacher-captions"), Ref(name="data")
HELD = HoldOut(per_source=2, seed=5)


def row(number: int, source: str, folder: Path) -> TeacherCaptionRow:
    file = folder / f"{number}.jpg"
    file.write_bytes(picture(number))
    rejected = number % 5 == 4
    return TeacherCaptionRow(
        id=f"{source}/{number}",
        source=source,
        uri=str(file),
        text=None if rejected else f"Caption {number} of <b>{source}</b>.",
        num_tokens=9,
        finish_reason="stop",
        reject="refused" if rejected else None,
        reject_detail="I cannot." if rejected else None,
        prompt="objects-2026-11",
        prompt_sha256=prompt("objects-2026-11").sha256,
        image_sha256="0" * 64,
        prompt_tokens=500,
        usd=0.003,
    )


@pytest.fixture
def where(tmp_path: Path) -> Where:
    where = Where(root=str(tmp_path / "root"), progress=False)
    rows = [row(n, "coco" if n < 10 else "sam", tmp_path) for n in range(20)]
    finish_rows(where.storage, CAPTIONS, TeacherCaptionRow, rows)
    return where


def review(where: Where) -> dict[str, dict[str, object]]:
    return write_review(
        captions=CAPTIONS,
        hold_out=HELD,
        prompts=lambda name: prompt(name).text,
        flag=lambda text, asked: "odd: short" if "Caption 1" in text else None,
        limits=ImageLimits(),
        fetch=FetchConfig(),
        where=where,
    )


def test_the_page_shows_each_source_with_prompt_length_and_price(where: Where) -> None:
    figures = review(where)
    assert figures["coco"]["images"] == 10
    assert figures["coco"]["rejected"] == 2
    page = where.storage.get(f"{CAPTIONS.path}/{PAGE}").decode()
    held = json.loads(where.storage.get(f"{CAPTIONS.path}/{IDS}"))["held_out"]
    assert len(held) == 4
    for key in held:
        assert key in page
    assert page.count("<article") == 4
    assert "<h2>coco</h2>" in page
    assert "<h2>sam</h2>" in page
    assert "asked: objects-2026-11" in page
    assert "$0.0030" in page
    assert prompt("objects-2026-11").text[:40] in page
    assert "<b>coco" not in page, "captions are text"


def test_nothing_that_is_read_is_trained_on(where: Where) -> None:
    review(where)
    held = set(json.loads(where.storage.get(f"{CAPTIONS.path}/{IDS}"))["held_out"])
    part = CaptionsPart(captions=CAPTIONS, hold_out=HELD)
    manifest = run(BuildConfig(parts=(part,), seed=1), out=DATA, where=where)
    data = where.storage.get(f"{DATA.path}/samples.arrow")
    samples = from_table(Sample, pa.ipc.open_file(pa.BufferReader(data)).read_all(), where="data")
    assert not held & {one.id for one in samples}
    rejected = manifest.counts["left_out_refused"]
    assert manifest.counts["left_out_held_out"] + rejected + len(samples) == 20
