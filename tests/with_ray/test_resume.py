# SPDX-License-Identifier: Apache-2.0
"""A resumed job keeps every valid part and makes damaged, foreign and missing ones again."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import _steps
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.recipes.line import CaptionStep
from tests.with_ray.caption_site import CAPTIONER, make_site

pytestmark = pytest.mark.usefixtures("ray_cluster")

RELEASED = Path(__file__).parents[1] / "data" / "runs-0.1"
PLACE = Path("/tmp/sg4v-runs-0.1/images")
"""The folder that the released rows name."""


def captioning() -> CaptionStep:
    step = RECIPES["demo"]().caption
    assert step is not None
    engine = EngineConfig(kind="fake", max_model_len=512, capacity=8)
    config = replace(step.config, quality=QualityConfig(min_words=1))
    batching = Batching(rows_per_part=5, rows_per_task=5)
    return replace(step, config=config, engine=engine, captioner=CAPTIONER, batching=batching)


def test_parts_that_are_damaged_foreign_or_gone_are_made_again(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 20)
    step, where = captioning(), Where(root=site.storage.root, engine_cpus=0.5, progress=False)
    first = _steps.caption_images(step, where)
    out = site.storage.sub(f"{step.out.path}/rows/attempt-0001")
    kept = {name: out.get(name) for name in out.list()}
    site.storage.delete(f"{step.out.path}/manifest.json")
    out.put("part-000001.parquet", kept["part-000001.parquet"][:-20])
    out.put("part-000002.parquet", kept["part-000003.parquet"])
    out.delete("part-000003.parquet")
    second = _steps.caption_images(step, where)
    assert second.counts == first.counts
    assert [file.path.rpartition("/")[2] for file in second.files] == [
        "part-000000.parquet",
        "part-000001.r1.parquet",
        "part-000002.r1.parquet",
        "part-000003.parquet",
    ]
    assert out.get("part-000000.parquet") == kept["part-000000.parquet"]
    assert "part-000001.parquet: no Parquet footer at its end; the part is made" in caplog.text
    assert "part-000002.parquet: it has other ids than its row range" in caplog.text
    site.check_exactly_once()


def test_a_captioning_that_version_0_1_left_unfinished_is_completed(tmp_path: Path) -> None:
    shutil.copytree(RELEASED / "root", tmp_path / "root")
    shutil.copytree(RELEASED / "images", PLACE, dirs_exist_ok=True)
    step = RECIPES["folder"]().caption
    assert step is not None
    step = replace(
        step,
        config=replace(step.config, quality=QualityConfig(min_words=1)),
        engine=replace(step.engine, kind="fake", max_model_len=512),
        captioner=Ref(name="tiny-captioner"),
        out=Ref(name="captions-killed"),
        batching=Batching(rows_per_part=3, rows_per_task=3),
    )
    where = Where(root=str(tmp_path / "root"), engine_cpus=0.5, progress=False)
    done = _steps.caption_images(step, where)
    assert done.counts["rows"] == 12
    assert {one.get("sg4v-ray") for one in done.software} == {"0.1", "0.1.0"}
    # The fake engine answers alike in both versions, so kept and new rows equal a finished run.
    finished = read_rows(where.storage, Ref(name="captions"), CaptionRow)
    assert [(row.id, row.text) for row in read_rows(where.storage, step.out, CaptionRow)] == [
        (row.id, row.text) for row in finished
    ]
    assert find(where.storage, step.out) == done
