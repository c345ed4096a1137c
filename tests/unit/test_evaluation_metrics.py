# SPDX-License-Identifier: Apache-2.0
"""How answers are scored, and what a guess without an image gets right."""

import pytest

from sg4v_ray.core.records import Prediction, Question
from sg4v_ray.evaluation.metrics import (
    by_answer,
    commonest_answer_accuracy,
    exact_match,
    is_right,
    normalise,
)


def question(text: str, answer: str) -> Question:
    return Question(id=text, image_id="i", uri="/i.png", text=text, answers=(answer,))


def predicted(answer: str, prediction: str | None, text: str = "q") -> Prediction:
    return Prediction(
        id="q",
        image_id="i",
        uri="/i.png",
        text=text,
        answers=(answer,),
        prediction=prediction,
        num_tokens=1,
        finish_reason=None if prediction is None else "stop",
        reject="truncated" if prediction is None else None,
        reject_detail=None,
    )


@pytest.mark.parametrize("text", ["Yes", " yes ", "yes.", "YES\n"])
def test_case_space_and_a_final_stop_do_not_matter(text: str) -> None:
    assert normalise(text) == "yes"


def test_a_longer_answer_is_another_answer() -> None:
    assert not is_right(predicted("red", "red circle"))


def test_a_question_without_an_answer_counts_as_wrong() -> None:
    assert exact_match([predicted("red", "Red."), predicted("red", None)]) == 0.5


def test_answers_are_counted_by_the_official_one() -> None:
    rows = [predicted("no", "no"), predicted("no", "yes"), predicted("red", "red")]
    assert by_answer(rows) == {"no": (1, 2), "red": (1, 1)}


def test_the_blind_guess_knows_only_question_texts() -> None:
    train = [question("a?", "yes"), question("a?", "yes"), question("a?", "no")]
    train += [question("b?", "red")]
    test = [question("a?", "yes"), question("a?", "no"), question("b?", "red")]
    assert commonest_answer_accuracy(train, [*test, question("new?", "yes")]) == 0.75
