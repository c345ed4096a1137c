# SPDX-License-Identifier: Apache-2.0
"""The JSON that LLaVA and ShareGPT4V publish, streamed in and out: one array of records.

    {"id": "000000000009", "image": "coco/train2017/000000000009.jpg",
     "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

A file of 1.2 million records has 1.5 GB, so neither direction holds more than one record. Every
record is checked when it is read; keys that are not of the schema stay.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Final

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.json_array import Element, read_objects
from sg4v_ray.core.location import is_container
from sg4v_ray.core.records import Turn

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "gpt": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}
_CONTROL: Final = re.compile(r"[\0-\x1f\x7f]")
_PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_ESCAPED = json.JSONEncoder(ensure_ascii=True, allow_nan=False)


def read_elements(file: BinaryIO, *, where: str) -> Iterator[Element]:
    """Yield the records of an array one by one as they stand in the file, with their places.

    Ids may repeat: LLaVA's mix has several records about one image under one id.

    Raises:
        ContractError: the file is no JSON array with records of this schema; names the record.
    """
    empty = True
    for element in read_objects(file, where=where):
        if (problem := problem_of(element.value)) is not None:
            raise ContractError(f"{where}: {element} {problem}")
        yield element
        empty = False
    if empty:
        raise ContractError(f"{where} is no JSON array with records: the array is empty")


def read_records(file: BinaryIO, *, where: str) -> Iterator[dict[str, Any]]:
    """Yield what `read_elements` does, without the places."""
    return (element.value for element in read_elements(file, where=where))


def problem_of(record: dict[str, Any]) -> str | None:
    """Say what keeps a record from being one of this schema, or None."""
    key = record.get("id")
    if type(key) is not str and type(key) is not int:
        return f"has the id {key!r}; an id is a string, or an integer as some of LLaVA's mix are"
    if not _is_unicode(str(key)):
        return f"has half of a surrogate pair in its id {_short(key)}; write another id"
    if "image" in record and (problem := _image_problem(record["image"])) is not None:
        return problem
    turns = record.get("conversations")
    if type(turns) is not list or not turns:
        return f"has no 'conversations', a list of turns; its keys are {', '.join(record)}"
    for turn, speaker in zip(turns, itertools.cycle(_ROLES), strict=False):
        if type(turn) is not dict or turn.get("from") != speaker:
            return f"has the turn {_short(turn)}; turns alternate from 'human' to 'gpt'"
        text = turn.get("value")
        if type(text) is not str:
            return f"has the turn {_short(turn)}; the 'value' of a turn is a string"
        if not _is_unicode(text):
            return f"has half of a surrogate pair in {_short(text)}; write U+FFFD in its place"
    return None


def _image_problem(image: object) -> str | None:
    """The file may be a stranger's, and its images are read with the rights of the cluster."""
    if (
        isinstance(image, str)
        and image
        and not image.startswith("/")
        and "://" not in image
        and not is_container(image)
        and ".." not in image.split("/")
        and not _CONTROL.search(image)
        and _is_unicode(image)
    ):
        return None
    return (
        f"has the image {_short(image)}, which is no path below the data folder; write one without "
        "'..', or leave the key out of a record that is text alone"
    )


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    return ascii(value)[:80]


def turns_of(record: dict[str, Any]) -> tuple[Turn, ...]:
    """Return a record's conversation, of one with an image without the placeholder.

    Its place in the text does not matter: the published loader moves it to the front
    (ShareGPT4Omni/ShareGPT4V@b6f70e9, train.py, preprocess_multimodal). Where there is no image,
    `<image>` is text: people talk about XML.
    """
    stays = "image" not in record
    return tuple(
        Turn(
            role=_ROLES[turn["from"]],
            text=turn["value"] if stays else turn["value"].replace(PLACEHOLDER, "").strip(),
        )
        for turn in record["conversations"]
    )


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
        file.write(line_of(record))
        number += 1
    file.write(b"\n]\n")
    return number


def line_of(record: dict[str, Any]) -> bytes:
    """Return a record as one line of JSON that reads the same."""
    try:
        return _PLAIN.encode(record).encode()
    except UnicodeEncodeError:  # half a surrogate pair in a key that is not of the schema
        return _ESCAPED.encode(record).encode()
