# SPDX-License-Identifier: Apache-2.0
"""The published JSON is read and written as LLaVA's own loader understands it."""

import io
import json
from typing import Any

import pytest

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.llava_json import read_records, record_of, turns_of, write_records
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


def read(data: bytes) -> list[dict[str, Any]]:
    return list(read_records(io.BytesIO(data), where="mix.json"))


def test_records_are_read_as_they_stand() -> None:
    assert read(json.dumps([PUBLISHED, PUBLISHED]).encode()) == [PUBLISHED, PUBLISHED]


def test_the_placeholder_is_no_part_of_the_text() -> None:
    user, assistant = turns_of(PUBLISHED, where="mix.json")
    assert user == Turn(role="user", text="What do you see happening in this image?")
    assert assistant.role == "assistant"


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
    assert turns_of(read(out.getvalue())[0], where="") == turns


def test_no_record_is_still_an_array() -> None:
    out = io.BytesIO()
    assert write_records(out, []) == 0
    assert json.loads(out.getvalue()) == []


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b'[{"id": 1}]', "record 0 has no 'conversations'", id="another schema"),
        pytest.param(b'{"id": 1}\n{"id": 2}', "no JSON", id="JSON lines"),
        pytest.param(b'[{"conversations": []}, {"con', "no JSON after record 1", id="cut off"),
        pytest.param(b"[]", "no JSON array with records", id="empty"),
        pytest.param(b"not json", "no JSON", id="text"),
    ],
)
def test_what_is_not_the_published_schema_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(ContractError, match=problem):
        read(data)


@pytest.mark.parametrize("turn", [{"from": "system", "value": "x"}, {"from": "gpt"}, {}])
def test_a_turn_of_nobody_is_refused_with_its_record(turn: dict[str, str]) -> None:
    with pytest.raises(ContractError, match="record '7'"):
        turns_of({"id": "7", "conversations": [turn]}, where="mix.json")
