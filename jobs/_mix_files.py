# SPDX-License-Identifier: Apache-2.0
"""Synthetic files of the published schema and sizes, to measure and test mixing with.

Nothing in them is from the published files but counts, folder names and questions.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring, encode_basestring_ascii
from pathlib import Path
from typing import Final

from sg4v_ray.dataset.choose import Share
from sg4v_ray.dataset.details import NUM_DETAILS, QUESTIONS_OF_THE_FILE
from sg4v_ray.dataset.layout import source_of
from sg4v_ray.dataset.mixture import PUBLISHED

_NUM_COCO: Final = 118_287
_TEXT: Final = (
    "the a image shows man woman dog table street near with and of white large standing left right "
    'background "STOP" caf\u00e9 two people holding red small which appears to be in front building'
)


@dataclass(frozen=True, slots=True)
class Group:
    """Records of one kind. The means are those reported of the published file, or near them."""

    name: str
    records: int
    folder: str | None
    rounds: float
    """Mean number of questions."""
    asked: int
    """Mean characters of a question."""
    answered: int
    """Mean characters of an answer."""


# Counts: haotian-liu/LLaVA#702 and the lengths of the files of LLaVA-Instruct-150K.
MIX: Final = (
    Group("detail", NUM_DETAILS, "coco/train2017", 1, 0, 609),
    Group("reasoning", 76_643, "coco/train2017", 1, 75, 736),
    Group("conversation", 57_829, "coco/train2017", 4.5, 53, 291),
    Group("vqav2", 82_783, "coco/train2017", 5.4, 80, 4),
    Group("okvqa", 8_998, "coco/train2017", 1, 90, 6),
    Group("a-okvqa", 66_160, "coco/train2017", 1, 210, 1),
    Group("refcoco", 48_447, "coco/train2017", 3, 100, 26),
    Group("gqa", 72_140, "gqa/images", 13, 75, 4),
    Group("ocr-vqa", 80_000, "ocr_vqa/images", 5, 60, 17),
    Group("textcaps", 21_953, "textvqa/train_images", 1, 130, 62),
    Group("vg", 86_417, "vg/VG_100K", 10, 95, 24),
    Group("sharegpt", 40_688, None, 4, 200, 900),
)
# Counts: dvlab-research/MGM#23; of COCO and LCS together 80,045.
CAPTIONS: Final = (
    Group("coco", 50_000, "coco/train2017", 1, 0, 942),
    Group("lcs", 30_045, "llava/llava_pretrain/images", 1, 0, 942),
    Group("sam", 19_982, "sam/images", 1, 0, 942),
    Group("textcaps", 500, "share_textvqa/images", 1, 0, 942),
    Group("wikiart", 500, "wikiart/images", 1, 0, 942),
    Group("web-landmark", 500, "web-landmark/images", 1, 0, 942),
    Group("web-celebrity", 498, "web-celebrity/images", 1, 0, 942),
)


def count(number: int, scale: float) -> int:
    """Return how many of a number of records there are at a scale."""
    return round(number * scale)


def shares(scale: float) -> tuple[Share, ...]:
    """Return the published shares at a scale."""
    return tuple(Share(source=one.source, captions=count(one.captions, scale)) for one in PUBLISHED)


def expected(scale: float) -> dict[str, int]:
    """Return how many records of each source the published mix has, from the counts above."""
    sources: Counter[str] = Counter()
    for group in MIX:
        if group.name != "detail":
            sources[source_of(group.folder and f"{group.folder}/x")] += count(group.records, scale)
    sources.update({one.source: one.captions for one in shares(scale)})
    return dict(sources)


def write_mix(path: Path, scale: float) -> int:
    """Write instruction data as long as LLaVA-1.5's mix, shuffled like it; return the records."""
    order = [group for group in MIX for _ in range(count(group.records, scale))]
    random.Random(1).shuffle(order)
    return _write(path, order, ascii_only=True)


def write_captions(path: Path, scale: float) -> int:
    """Write captions as many as the published 100K; return the records."""
    order = [group for group in CAPTIONS for _ in range(count(group.records, scale))]
    return _write(path, order, ascii_only=False)


def _write(path: Path, order: list[Group], *, ascii_only: bool) -> int:
    text = _Text(ascii_only)
    made: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        for number, group in enumerate(order):
            file.write(",\n" if number else "")
            file.write(_record(group, made[group.name], text))
            made[group.name] += 1
        file.write("\n]\n")
    return len(order)


class _Text:
    """Cuts texts out of a fixed run of words; a random number for each would take minutes."""

    def __init__(self, ascii_only: bool) -> None:
        self.random = random.Random(2)
        words = _TEXT.split()
        self._words = " ".join(self.random.choice(words) for _ in range(200_000))
        self._at = 0
        self.quoted = encode_basestring_ascii if ascii_only else encode_basestring

    def about(self, mean: int) -> str:
        """Return a text of about so many characters."""
        size = max(1, round(mean * self.random.uniform(0.5, 1.5)))
        self._at = (self._at + 7_919) % (len(self._words) - 2 * mean - 2)
        return self._words[self._at : self._at + size]


def _record(group: Group, number: int, text: _Text) -> str:
    """Return a record indented as the published files are."""
    if group.folder is None:
        head = f'"id": "text{number}_0",\n    "model": ""'
    else:
        key, image = _names(group, number)
        head = f'"id": {key},\n    "image": "{group.folder}/{image}"'
    turns = ",\n".join(
        f'      {{\n        "from": "{speaker}",\n        "value": {text.quoted(said)}\n      }}'
        for speaker, said in _turns(group, number, text)
    )
    return f'  {{\n    {head},\n    "conversations": [\n{turns}\n    ]\n  }}'


def _names(group: Group, number: int) -> tuple[str, str]:
    """Return id and image file. COCO's images repeat between groups, and so do their ids."""
    if group.folder == "coco/train2017":
        step = 5 if group.name == "detail" else 1  # 10,000 details are about captioned images
        name = f"{number * step % _NUM_COCO:012d}"
        return f'"{name}"', f"{name}.jpg"
    if group.name == "vg":
        return str(2_300_000 + number), f"{2_300_000 + number}.jpg"
    return f'"{group.name}_{number:09d}"', f"{group.name}_{number:09d}.jpg"


def _turns(group: Group, number: int, text: _Text) -> Iterator[tuple[str, str]]:
    rounds = max(1, round(group.rounds * text.random.uniform(0.5, 1.5)))
    asks_like_a_detail = group.asked == 0 or (
        # What looks like a detailed caption and is none: not alone, or about no COCO image.
        number % 50 == 0 and (rounds > 1 or group.folder != "coco/train2017")
    )
    for turn in range(rounds):
        question = text.about(group.asked)
        if turn == 0 and asks_like_a_detail:
            question = QUESTIONS_OF_THE_FILE[number % len(QUESTIONS_OF_THE_FILE)]
        place = "\n<image>" if number % 2 else "<image>\n"
        if turn or group.folder is None:
            yield "human", question
        else:
            yield "human", question + place if number % 2 else place + question
        yield "gpt", text.about(group.answered)
