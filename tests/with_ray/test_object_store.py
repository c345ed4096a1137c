# SPDX-License-Identifier: Apache-2.0
"""Everything on s3://: images, index, captioner, captions, leases, notes of finished rows."""

from pathlib import Path

import pytest

from jobs import _steps
from sg4v_ray.core.artifact import is_finished
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.recipes.easy_vqa import CAPTIONS, TEST_IMAGES
from sg4v_ray.recipes.line import IndexStep
from sg4v_ray.sources import shapes
from sg4v_ray.sources.folder import Folder
from sg4v_ray.sources.index import IndexConfig
from tests.with_ray.caption_site import CAPTIONER, Site, finish

pytestmark = pytest.mark.timeout(900)

BUCKET = "s3://sg4v-test"
NUM_IMAGES = 60


def test_a_killed_job_on_an_object_store_resumes_and_commits(
    s3: dict[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    for number in range(NUM_IMAGES):
        shapes.draw(number).save(tmp_path / f"{number:03d}.png")
    Storage(BUCKET).upload(tmp_path, "images")
    where = Where(root=f"{BUCKET}/runs", progress=False)
    source = Folder(path=f"{BUCKET}/images")
    _steps.index_images(IndexStep(config=IndexConfig(sources=(source,)), out=TEST_IMAGES), where)
    model = where.storage.upload(tiny_model, f"{CAPTIONER.path}/model")
    finish(where.storage, CAPTIONER, digests=model)
    site = Site(where.storage, NUM_IMAGES, tmp_path, s3)
    killed = site.drive()
    killed.until(lambda: site.committed() > 0)
    killed.kill()
    assert not is_finished(site.storage, CAPTIONS, config={})
    site.drive().succeed()
    site.check_exactly_once()
