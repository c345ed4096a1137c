# SPDX-License-Identifier: Apache-2.0
"""The published JSON is read and written as LLaVA's own loader understands it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.llava_file import check_place, digest_at, records_at
from sg4v_ray.core.llava_json import (
    read_elements,
    read_records,
    record_of,
    turns_of,
    write_records,
)
from sg4v_ray.core.records import Turn

# As in the published file: the placeholder follows the text.
PUBLISHED = {
    "id": "000000000009",
    "image": "coco/train2017/000000000009.jpg",
    "conversations": [
        {"from": "human", "value": "What do you see happening in this image?\n<image>"},
        {"from": "gpt", "value": "In the center of the image, a vibrant blue lunch tray ..."},
    ],
}
# As ShareGPT's in LLaVA's mix: no image, and a key that the schema does not know.
TEXT_ONLY = {
    "id": "qMJbMtG_0",
    "model": "",
    "conversations": [
        {"from": "human", "value": "What is <image> in SVG?"},
        {"from": "gpt", "value": "An element."},
    ],
}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}


def read(data: bytes) -> list[dict[str, Any]]:
    return list(read_records(io.BytesIO(data), where="mix.json"))


def with_keys(**keys: Any) -> bytes:
    return json.dumps([PUBLISHED, {**PUBLISHED, **keys}]).encode()


def test_records_are_read_as_they_stand_also_those_of_one_id() -> None:
    records = [PUBLISHED, TEXT_ONLY, PUBLISHED, {**PUBLISHED, "id": 2404787}]
    assert read(json.dumps(records).encode()) == records


def test_what_is_read_is_written_the_same() -> None:
    records = [PUBLISHED, {**TEXT_ONLY, "model": "half a pair \ud800", "score": 0.1, "n": 10**30}]
    out = io.BytesIO()
    assert write_records(out, records) == 2
    assert read(out.getvalue()) == records
    assert out.getvalue().count(b"\n") == 4, "a line each"


def test_the_placeholder_is_no_part_of_the_text() -> None:
    user, assistant = turns_of(PUBLISHED)
    assert user == Turn(role="user", text="What do you see happening in this image?")
    assert assistant.role == "assistant"


def test_without_an_image_the_placeholder_is_text_that_somebody_wrote() -> None:
    assert turns_of(TEXT_ONLY)[0].text == "What is <image> in SVG?"


def test_what_is_written_reads_the_same_and_begins_with_the_placeholder() -> None:
    turns = (
        Turn(role="user", text="What is it?"),
        Turn(role="assistant", text='A "red" caf\u00e9'),
    )
    out = io.BytesIO()
    records = [record_of("1", "a/1.jpg", turns), record_of("2", None, turns)]
    assert write_records(out, records) == 2
    with_image, without = json.loads(out.getvalue())
    assert with_image["conversations"][0]["value"] == "<image>\nWhat is it?"
    assert with_image["image"] == "a/1.jpg"
    assert "image" not in without
    assert turns_of(read(out.getvalue())[0]) == turns


def test_no_record_is_still_an_array() -> None:
    out = io.BytesIO()
    assert write_records(out, []) == 0
    assert json.loads(out.getvalue()) == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'{"id": 1}\n{"id": 2}', id="JSON lines"),
        pytest.param(b"[]", id="empty array"),
        pytest.param(b"", id="empty file"),
        pytest.param(b"not json", id="text"),
        pytest.param(json.dumps({"data": [PUBLISHED]}).encode(), id="array inside an object"),
    ],
)
def test_what_is_no_array_of_records_is_refused(data: bytes) -> None:
    with pytest.raises(ContractError, match=r"mix\.json.* is no JSON array with records"):
        read(data)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        pytest.param({"conversations": None}, "no 'conversations'", id="no list"),
        pytest.param({"conversations": []}, "no 'conversations'", id="no turn"),
        pytest.param({"conversations": [GPT, HUMAN]}, "alternate", id="the model begins"),
        pytest.param({"conversations": [HUMAN, HUMAN]}, "alternate", id="twice the human"),
        pytest.param(
            {"conversations": [{"from": "system", "value": "x"}]}, "alternate", id="other"
        ),
        pytest.param({"conversations": ["Hi"]}, "alternate", id="turn is a text"),
        pytest.param({"conversations": [HUMAN, {"from": "gpt"}]}, "'value'", id="no value"),
        pytest.param({"conversations": [{"from": "human", "value": 1}]}, "'value'", id="number"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "a \ud83d"}]},
            "surrogate",
            id="half a pair",
        ),
        pytest.param({"id": None}, "the id None", id="id null"),
        pytest.param({"id": True}, "the id True", id="id true"),
        pytest.param({"id": 1.5}, "the id 1.5", id="id fraction"),
        pytest.param({"id": "\udc00"}, "surrogate pair in its id", id="id no Unicode"),
        pytest.param({"image": None}, "leave the key out", id="image null"),
        pytest.param({"image": ""}, "no path below", id="image empty"),
        pytest.param({"image": ["a.jpg"]}, "no path below", id="image list"),
        pytest.param({"image": "/etc/passwd"}, "no path below", id="absolute"),
        pytest.param({"image": "a/../../b.jpg"}, "no path below", id="upward"),
        pytest.param({"image": "s3://b/c.jpg"}, "no path below", id="URI"),
        pytest.param({"image": "tar:0:9:/etc/passwd"}, "no path below", id="piece of a file"),
        pytest.param({"image": "a\0.jpg"}, "no path below", id="control character"),
        pytest.param({"image": "\udcff.jpg"}, "no path below", id="name that is no Unicode"),
    ],
)
def test_a_record_of_another_schema_is_refused_by_number_and_byte(
    keys: dict[str, Any], problem: str
) -> None:
    data = with_keys(**keys)
    offset = len(json.dumps([PUBLISHED])) + 1
    with pytest.raises(ContractError, match=rf"record 1 at byte {offset:,} .*{problem}"):
        read(data)


def test_a_record_without_an_id_is_refused() -> None:
    with pytest.raises(ContractError, match="record 0 at byte 1 has the id None"):
        read(json.dumps([{"conversations": [HUMAN, GPT]}]).encode())


def test_places_count_bytes_of_the_file_not_characters() -> None:
    records = [{**PUBLISHED, "id": "caf\u00e9 \U0001f600"}, PUBLISHED]
    data = b"\xef\xbb\xbf" + json.dumps(records, ensure_ascii=False, indent=2).encode()
    for element in read_elements(io.BytesIO(data), where=""):
        assert json.JSONDecoder().raw_decode(data[element.offset :].decode())[0] == element.value


def test_a_file_is_read_and_fingerprinted_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([PUBLISHED]))
    assert [one.value for one in records_at(str(file))] == [PUBLISHED]
    assert [one.value for one in records_at(f"file://{file}", bar="mix")] == [PUBLISHED]
    before = digest_at(str(file))
    file.write_text(json.dumps([TEXT_ONLY]))
    assert len(before) == 64 and digest_at(str(file), bar="mix") != before


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_is_not_there_is_the_users_mistake(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .* check the path"):
        list(records_at(f"{tmp_path}/{name}"))


@pytest.mark.parametrize("place", ["mix.json", "https://a.org/mix.json", "s3://b%20/mix.json"])
def test_a_file_is_given_by_an_absolute_path_or_a_buckets_uri(place: str) -> None:
    check_place("/data/mix.json")
    check_place("/mix.json")
    check_place("s3://bucket/mix.json")
    with pytest.raises(ConfigError):
        check_place(place)
