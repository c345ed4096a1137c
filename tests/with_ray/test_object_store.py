# SPDX-License-Identifier: Apache-2.0
"""Everything on s3://: images, index, captioner, captions, leases, notes of finished rows."""

import logging
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

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
NUM_IMAGES = 120


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A local S3 with one bucket, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=BUCKET.removeprefix("s3://"))
    yield environment
    server.stop()


def test_a_killed_job_on_an_object_store_resumes_and_commits(
    bucket: dict[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    for number in range(NUM_IMAGES):
        shapes.draw(number).save(tmp_path / f"{number:03d}.png")
    Storage(BUCKET).upload(tmp_path, "images")
    where = Where(root=f"{BUCKET}/runs", progress=False)
    source = Folder(path=f"{BUCKET}/images")
    _steps.index_images(IndexStep(config=IndexConfig(sources=(source,)), out=TEST_IMAGES), where)
    model = where.storage.upload(tiny_model, f"{CAPTIONER.path}/model")
    finish(where.storage, CAPTIONER, digests=model)
    site = Site(where.storage, NUM_IMAGES, tmp_path, bucket)
    killed = site.drive()
    killed.until(lambda: site.committed() > 0)
    killed.kill()
    assert not is_finished(site.storage, CAPTIONS, config={})
    site.drive().succeed()
    site.check_exactly_once()
