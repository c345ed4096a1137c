# SPDX-License-Identifier: Apache-2.0
"""Instruction data, captions and their mix may lie in a bucket."""

import json
import logging
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.llava_file import records_at
from sg4v_ray.core.where import Where
from sg4v_ray.dataset.mixture import MixConfig, run

pytestmark = pytest.mark.teacher

DETAIL = {
    "id": "9",
    "image": "coco/train2017/9.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nDescribe the following image."},
        {"from": "gpt", "value": "Old."},
    ],
}
CAPTION = {
    **DETAIL,
    "conversations": [DETAIL["conversations"][0], {"from": "gpt", "value": "New."}],
}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local S3 with both files, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    url = f"http://127.0.0.1:{port}"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")
    for name, value in zip(names, ("test", "test", "us-east-1", url), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    client.create_bucket(Bucket="sg4v-mix")
    for name, record in (("sft", DETAIL), ("captions", CAPTION)):
        client.put_object(Bucket="sg4v-mix", Key=f"{name}.json", Body=json.dumps([record]).encode())
    yield "s3://sg4v-mix"
    server.stop()


def test_files_of_a_bucket_are_mixed_into_a_bucket(bucket: str) -> None:
    config = MixConfig(sft=f"{bucket}/sft.json", captions=f"{bucket}/captions.json", seed=1)
    where = Where(root=f"{bucket}/root")
    run(config, out=Ref(name="mix"), where=where)
    assert json.loads(where.storage.get("mix/v1/mix.json")) == [CAPTION]
    with pytest.raises(ConfigError, match=r"there is no file s3://sg4v-mix/none\.json"):
        list(records_at(f"{bucket}/none.json"))
