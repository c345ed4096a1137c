# SPDX-License-Identifier: Apache-2.0
"""The JSON that LLaVA and ShareGPT4V publish, streamed in and out: one array of records.

    {"id": "000000000009", "image": "coco/train2017/000000000009.jpg",
     "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

A file of 1.2 million records has 1.5 GB, so neither direction holds more than one record.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import ijson

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.records import Turn

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "gpt": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


def read_records(file: BinaryIO, *, where: str) -> Iterator[dict[str, Any]]:
    """Yield the records of an array one by one, as they stand in the file.

    Raises:
        ContractError: the file is no JSON array of objects with `id` and `conversations`.
    """
    number = 0
    try:
        for record in ijson.items(file, "item", use_float=True):
            if not isinstance(record, dict) or "conversations" not in record:
                raise ContractError(f"{where}: record {number} has no 'conversations'")
            yield record
            number += 1
    except ijson.JSONError as error:
        raise ContractError(f"{where}: no JSON after record {number}: {error}") from error
    if number == 0:
        raise ContractError(f"{where} is no JSON array with records; JSON lines are not read")


def turns_of(record: dict[str, Any], *, where: str) -> tuple[Turn, ...]:
    """Return a record's conversation without the image placeholder.

    Its place in the text does not matter: the published loader moves it to the front
    (ShareGPT4Omni/ShareGPT4V@b6f70e9, train.py, preprocess_multimodal).

    Raises:
        ContractError: a turn has no `from` or `value`, or another speaker.
    """
    turns = []
    for turn in record["conversations"]:
        speaker, text = turn.get("from"), turn.get("value")
        if speaker not in _ROLES or not isinstance(text, str):
            raise ContractError(
                f"{where}: record {record.get('id')!r} has a turn from {speaker!r}; "
                "turns are from 'human' or 'gpt' and have a 'value'"
            )
        turns.append(Turn(role=_ROLES[speaker], text=text.replace(PLACEHOLDER, "").strip()))
    return tuple(turns)


def record_of(key: str, image: str | None, turns: Iterable[Turn]) -> dict[str, Any]:
    """Return one record; with an image the first turn begins with its placeholder."""
    said = [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in turns]
    if image is None:
        return {"id": key, "conversations": said}
    said[0]["value"] = f"{PLACEHOLDER}\n{said[0]['value']}"
    return {"id": key, "image": image, "conversations": said}


def write_records(file: BinaryIO, records: Iterable[dict[str, Any]]) -> int:
    """Write records as one array, a line each; return how many."""
    file.write(b"[")
    number = 0
    for record in records:
        file.write(b",\n" if number else b"\n")
        file.write(json.dumps(record, ensure_ascii=False).encode())
        number += 1
    file.write(b"\n]\n")
    return number
