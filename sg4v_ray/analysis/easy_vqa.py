# SPDX-License-Identifier: Apache-2.0
"""What the official easy-VQA questions say is in an image, and how often captions agree.

easy-VQA publishes no scene descriptions, so the official shape and colour of an image are read
off its questions: "what color is the circle?" names both, "is there a red shape?" with the
answer yes names one. An image whose questions name neither is left out of that figure.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.records import Question

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_NEGATED = re.compile(r"\b(not|no)\b")


@dataclass(frozen=True, slots=True)
class Official:
    """What the questions about one image determine."""

    shape: str | None
    colour: str | None


def official(questions: Iterable[Question]) -> dict[str, Official]:
    """Return what is known of each image, by image id: what is named, or all others are denied.

    Raises:
        ContractError: the questions about one image contradict each other.
    """
    possible: dict[str, tuple[set[str], set[str]]] = {}
    for one in questions:
        left = possible.setdefault(one.image_id, (set(SHAPES), set(COLOURS)))
        for words in left:
            _narrow(words, one)
            if not words:
                raise ContractError(f"the questions about {one.image_id} contradict each other")
    return {
        key: Official(_only(shapes), _only(colours)) for key, (shapes, colours) in possible.items()
    }


def _only(words: set[str]) -> str | None:
    return next(iter(words)) if len(words) == 1 else None


def _narrow(words: set[str], question: Question) -> None:
    """Take out of `words` what a question and its answer exclude."""
    (answer,) = question.answers
    named = {word for word in (*SHAPES, *COLOURS) if re.search(rf"\b{word}\b", question.text)}
    if answer in ("yes", "no"):
        there = (answer == "yes") != bool(_NEGATED.search(question.text))
        if not there:
            words -= named
            return
    else:
        named.add(answer)
    if words & named:
        words &= named


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many captions name what the questions determine."""

    right_shape: float
    right_shape_of: int
    right_colour: float
    right_colour_of: int


def agreement(captions: Mapping[str, str | None], known: Mapping[str, Official]) -> Agreement:
    """Compare captions with the official shapes and colours.

    A caption is right if it names the official word and no other of its kind; an image without
    a caption is wrong.
    """
    shape = [names(captions.get(key), one.shape, SHAPES) for key, one in known.items() if one.shape]
    colour = [
        names(captions.get(key), one.colour, COLOURS) for key, one in known.items() if one.colour
    ]
    return Agreement(
        sum(shape) / max(1, len(shape)), len(shape), sum(colour) / max(1, len(colour)), len(colour)
    )


def names(caption: str | None, word: str | None, words: tuple[str, ...]) -> bool:
    """Say whether a caption names `word` and no other of `words`."""
    found = {one for one in words if re.search(rf"\b{one}s?\b", (caption or "").lower())}
    return found == {word}
