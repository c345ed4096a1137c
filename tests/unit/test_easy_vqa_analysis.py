# SPDX-License-Identifier: Apache-2.0
"""What the official questions determine, and when a caption agrees with them."""

from collections import defaultdict

import pytest

from sg4v_ray.analysis.easy_vqa import Official, agreement, names, official
from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.records import Question
from sg4v_ray.sources.easy_vqa import EasyVqaQuestions

COLOURS = ("red", "blue")


def asked(*pairs: tuple[str, str]) -> list[Question]:
    return [
        Question(id=str(n), image_id="i", uri="/i.png", text=text, answers=(answer,))
        for n, (text, answer) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("questions", "known"),
    [
        pytest.param([("what shape is present?", "circle")], Official("circle", None), id="asked"),
        pytest.param(
            [("what color is the circle?", "red")], Official("circle", "red"), id="both at once"
        ),
        pytest.param([("is there a red shape?", "yes")], Official(None, "red"), id="yes"),
        pytest.param([("is there a red shape?", "no")], Official(None, None), id="no"),
        pytest.param([("is there not a red shape?", "no")], Official(None, "red"), id="not no"),
        pytest.param([("is no red shape present?", "no")], Official(None, "red"), id="no no"),
        pytest.param([("is no red shape present?", "yes")], Official(None, None), id="no yes"),
        pytest.param(
            [("is there a circle?", "no"), ("is no triangle present?", "yes")],
            Official("rectangle", None),
            id="all others are denied",
        ),
    ],
)
def test_what_a_question_determines(questions: list[tuple[str, str]], known: Official) -> None:
    assert official(asked(*questions)) == {"i": known}


def test_contradicting_questions_are_an_error() -> None:
    with pytest.raises(ContractError, match="contradict"):
        official(asked(("what shape is present?", "circle"), ("is there a circle?", "no")))


def test_the_official_test_questions_determine_954_shapes_and_922_colours() -> None:
    everywhere: defaultdict[str, str] = defaultdict(lambda: "/i.png")
    for number in range(1000):
        everywhere[f"test-{number:05d}"]
    known = official(EasyVqaQuestions(split="test").rows(everywhere))
    assert len(known) == 1000
    assert sum(1 for one in known.values() if one.shape) == 954
    assert sum(1 for one in known.values() if one.colour) == 922


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("A Red circle.", True),
        ("A red circle, not blue.", False),
        ("Something reddish.", False),
        (None, False),
    ],
)
def test_a_caption_is_right_if_it_names_the_word_and_no_other(
    caption: str | None, right: bool
) -> None:
    assert names(caption, "red", COLOURS) is right


def test_an_image_without_a_caption_is_wrong_and_an_undetermined_one_not_counted() -> None:
    known = {"a": Official("circle", "red"), "b": Official("circle", None)}
    found = agreement({"a": "a red circle", "b": None}, known)
    assert (found.right_shape, found.right_shape_of) == (0.5, 2)
    assert (found.right_colour, found.right_colour_of) == (1.0, 1)
