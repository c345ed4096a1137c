# SPDX-License-Identifier: Apache-2.0
"""A LLaVA JSON, or a mix, becomes training data: every record is there, or its loss is counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ArtifactDrift, ArtifactMissing, ConfigError, ContractError
from sg4v_ray.core.records import Sample, from_table
from sg4v_ray.core.where import Where
from sg4v_ray.dataset.build import BuildConfig, run
from sg4v_ray.dataset.conversations import JsonPart, MixPart
from sg4v_ray.dataset.mixture import MixConfig
from sg4v_ray.dataset.mixture import run as mix

pytestmark = pytest.mark.teacher

OUT = Ref(name="data")


def record(key: Any, image: str | None, *said: str) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(said)
    turns = [{"from": who, "value": text} for who, text in zip(speakers, said, strict=False)]
    return {"id": key, "conversations": turns} | ({"image": image} if image else {})


RECORDS = [
    record("1", "coco/train2017/1.jpg", "What is it?\n<image>", "A dog.", "Red?", "No."),
    record(1, "vg/VG_100K/1.jpg", "<image>\nWhere?", "There."),
    record("t_0", None, "Explain <image> in XML.", "It is a tag."),
    record("1", "gqa/images/1.jpg", "<image>\nWho?", "Ann.", "Why?"),
    record("1#2", "sam/images/1.jpg", "<image>\nDescribe it.", "A house."),
    record("q", "sam/images/2.jpg", "<image>\nDescribe it."),
]


@pytest.fixture
def where(tmp_path: Path) -> Where:
    (tmp_path / "llava.json").write_text(json.dumps(RECORDS))
    return Where(root=str(tmp_path / "root"), progress=False)


@pytest.fixture
def part(tmp_path: Path) -> JsonPart:
    return JsonPart(json=f"{tmp_path}/llava.json", images="/data/")


def built(where: Where, *parts: JsonPart | MixPart) -> list[Sample]:
    run(BuildConfig(parts=parts, seed=1), out=OUT, where=where)
    data = where.storage.get(f"{OUT.path}/samples.arrow")
    return from_table(Sample, pa.ipc.open_file(pa.BufferReader(data)).read_all(), where="data")


def test_records_become_samples_in_their_order_with_the_images_below_the_root(
    where: Where, part: JsonPart
) -> None:
    samples = built(where, part)
    assert [one.uri for one in samples[:3]] == [
        "/data/coco/train2017/1.jpg",
        "/data/vg/VG_100K/1.jpg",
        None,
    ]
    assert [one.source for one in samples] == ["coco", "vg", "text", "gqa", "sam"]
    assert [turn.text for turn in samples[0].turns] == ["What is it?", "A dog.", "Red?", "No."]
    assert samples[2].turns[0].text == "Explain <image> in XML.", "there it is text"


def test_ids_that_repeat_are_numbered_and_never_meet_another(where: Where, part: JsonPart) -> None:
    assert [one.id for one in built(where, part)] == ["1", "1#2", "t_0", "1#3", "1#2#2"]


def test_a_question_without_an_answer_is_cut_off_and_counted(where: Where, part: JsonPart) -> None:
    samples = built(where, part)
    assert [turn.text for turn in samples[3].turns] == ["Who?", "Ann."]
    counts = json.loads(where.storage.get(f"{OUT.path}/manifest.json"))["counts"]
    assert counts["unanswered_questions"] == 2
    assert counts["left_out_no_answer"] == 1
    assert counts["samples"] == 5
    assert "| no_answer | 1 |" in where.storage.get(f"{OUT.path}/README.md").decode()


def test_a_finished_mix_is_trained_on_by_its_name(where: Where, tmp_path: Path) -> None:
    captions = [record("9", "sam/images/9.jpg", "Describe it.\n<image>", "A lake.")]
    detail = record("7", "coco/train2017/7.jpg", "Describe the following image.\n<image>", "Old.")
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "sft.json").write_text(json.dumps([RECORDS[2], detail]))
    config = MixConfig(
        sft=f"{tmp_path}/sft.json", captions=f"{tmp_path}/captions.json", seed=1, file="other.json"
    )
    of_mix = MixPart(mix=Ref(name="sft-mix"), images="/data")
    with pytest.raises(ArtifactMissing, match="sft-mix@v1 is not finished"):
        built(where, of_mix)
    mix(config, out=of_mix.mix, where=where)
    assert [one.id for one in built(where, of_mix)] == ["t_0", "9"]


def test_data_of_a_file_that_was_changed_are_not_taken_for_the_old(
    where: Where, part: JsonPart, tmp_path: Path
) -> None:
    built(where, part)
    (tmp_path / "llava.json").write_text(json.dumps(RECORDS[:1]))
    with pytest.raises(ArtifactDrift, match=r"llava\.json"):
        built(where, part)


def test_a_bad_record_fails_the_build_by_its_number_and_leaves_nothing(
    where: Where, part: JsonPart, tmp_path: Path
) -> None:
    (tmp_path / "llava.json").write_text(json.dumps([*RECORDS, record("x", "../x.jpg", "Hi")]))
    with pytest.raises(ContractError, match=r"record 6 at byte [\d,]+ .*no path below"):
        built(where, part)
    assert not where.storage.exists(f"{OUT.path}/manifest.json")


def test_a_file_that_is_not_there_fails_before_any_work(where: Where, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        built(where, JsonPart(json=f"{tmp_path}/no.json", images="/data"))
    with pytest.raises(ConfigError, match="relative"):
        JsonPart(json="llava.json", images="/data")
    with pytest.raises(ConfigError, match="relative"):
        MixPart(mix=OUT, images="data")


def test_two_parts_of_one_file_share_ids_and_are_refused(where: Where, part: JsonPart) -> None:
    with pytest.raises(ContractError, match="have a sample '1'"):
        built(where, part, part)
