# SPDX-License-Identifier: Apache-2.0
"""Instruction data, captions and their mix may lie in a bucket."""

import json

import pytest

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.llava_file import records_at
from sg4v_ray.core.storage import Storage
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


@pytest.mark.usefixtures("s3")
def test_files_of_a_bucket_are_mixed_into_a_bucket() -> None:
    bucket = "s3://sg4v-test"
    for name, record in (("sft", DETAIL), ("captions", CAPTION)):
        Storage(bucket).put(f"{name}.json", json.dumps([record]).encode())
    config = MixConfig(sft=f"{bucket}/sft.json", captions=f"{bucket}/captions.json", seed=1)
    where = Where(root=f"{bucket}/root")
    run(config, out=Ref(name="mix"), where=where)
    assert json.loads(where.storage.get("mix/v1/mix.json")) == [CAPTION]
    with pytest.raises(ConfigError, match=r"there is no file s3://sg4v-test/none\.json"):
        list(records_at(f"{bucket}/none.json"))
