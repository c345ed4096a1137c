# SPDX-License-Identifier: Apache-2.0
"""Which records of LLaVA's instruction data are its detailed captions (`detail_23k.json`).

The files do not say so. A detailed caption is one question and one answer about a COCO image, and
the question is one of a fixed few; or it is a record of `detail_23k.json` itself, where somebody
has that.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from sg4v_ray.core.llava_file import records_at
from sg4v_ray.core.llava_json import PLACEHOLDER
from sg4v_ray.dataset.layout import COCO, source_of
from sg4v_ray.model.instructions import UNIFIED

IsDetail: TypeAlias = Callable[[dict[str, Any]], bool]

NUM_DETAILS: Final = 23_240
"""Records of `detail_23k.json`; LLaVA-Instruct-158K and LLaVA-1.5's mix hold all of them."""

QUESTIONS_OF_THE_FILE: Final = (
    UNIFIED,
    "What do you see happening in this image?",
    "What do you think is going on in this snapshot?",
    "Can you elaborate on the elements of the picture provided?",
    "Describe the following image.",
    "Write a detailed description of the given image.",
    "Explain the visual content of the image in great detail.",
    "Can you describe the main features of this image for me?",
    "What are the key elements in this picture?",
    "What's happening in the scene?",
    "What is this photo about'?",
)
"""What `detail_23k.json` asks. The quote before the last question mark is the file's.

They are not those of the paper (haotian-liu/LLaVA#745). Source: togethercomputer/Dragonfly,
pipeline/data_utils/data.py, IMAGE_CAP_INSTRUCT, which is these eleven and the eleven of
LLaVA-Pretrain; records of the file quoted in public code. Their mean length, 44.45 characters, is
the 44.5 that is reported of the file's questions."""

QUESTIONS_OF_THE_PAPER: Final = (
    "Describe the following image in detail",
    "Provide a detailed description of the given image",
    "Give an elaborate explanation of the image you see",
    "Share a comprehensive rundown of the presented image",
    "Offer a thorough analysis of the image",
    "Explain the various aspects of the image before you",
    "Clarify the contents of the displayed image with great detail",
    "Characterize the image using a well-detailed description",
    "Break down the elements of the image in a detailed manner",
    "Walk through the important details of the image",
    "Portray the image with a rich, descriptive narrative",
    "Narrate the contents of the image with precision",
    "Analyze the image in a comprehensive and detailed manner",
    "Illustrate the image through a descriptive explanation",
    "Examine the image closely and share its details",
    "Write an exhaustive depiction of the given image",
)
"""The 16 instructions for detailed descriptions of Visual Instruction Tuning (arXiv 2304.08485,
appendix), which data made after the paper asks. One of them is in the file."""


def _plain(question: str) -> str:
    return question.replace(PLACEHOLDER, "").strip().removesuffix(".")


_QUESTIONS: Final = frozenset(map(_plain, (*QUESTIONS_OF_THE_FILE, *QUESTIONS_OF_THE_PAPER)))


def asks_for_detail(record: dict[str, Any]) -> bool:
    """Say whether a record is a detailed caption by what it asks."""
    turns = record["conversations"]
    return (
        len(turns) == 2
        and _plain(turns[0]["value"]) in _QUESTIONS
        and source_of(record.get("image")) == COCO
    )


def in_file(uri: str) -> IsDetail:
    """Return what says whether a record is in a file: by its id and its answer.

    Raises:
        ConfigError: there is no such file.
        ContractError: it is no LLaVA JSON.
    """
    known = {_id_and_answer(element.value) for element in records_at(uri)}
    return lambda record: _id_and_answer(record) in known


def _id_and_answer(record: dict[str, Any]) -> bytes:
    turns = record["conversations"]
    answer = turns[1]["value"] if len(turns) == 2 else ""
    return hashlib.sha256(f"{record['id']}\n{answer}".encode()).digest()
