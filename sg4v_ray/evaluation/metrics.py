# SPDX-License-Identifier: Apache-2.0
"""How answers are scored. Pure functions over questions and predictions."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from sg4v_ray.core.records import Prediction, Question


def normalise(text: str) -> str:
    """Return a short answer in the form in which it is compared: lower case, no final stop."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def is_right(prediction: Prediction) -> bool:
    """Say whether a prediction equals one of the accepted answers. A rejected row is wrong."""
    if prediction.prediction is None:
        return False
    return normalise(prediction.prediction) in {normalise(one) for one in prediction.answers}


def exact_match(predictions: Sequence[Prediction]) -> float:
    """Return the share of right answers, 0 to 1, over all questions, rejected ones included."""
    return sum(map(is_right, predictions)) / len(predictions)


def by_answer(predictions: Iterable[Prediction]) -> dict[str, tuple[int, int]]:
    """Return (right, asked) for each official answer, most asked first."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for one in predictions:
        asked[one.answers[0]] += 1
        right[one.answers[0]] += is_right(one)
    return {answer: (right[answer], count) for answer, count in asked.most_common()}


def commonest_answer_accuracy(train: Iterable[Question], test: Sequence[Question]) -> float:
    """Return the accuracy of answering each question text with its commonest training answer.

    It needs no image: what a model scores above it comes from looking.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for one in train:
        answers[one.text][one.answers[0]] += 1
        overall[one.answers[0]] += 1
    blind = overall.most_common(1)[0][0]
    right = 0
    for one in test:
        seen = answers.get(one.text)
        guess = seen.most_common(1)[0][0] if seen else blind
        right += guess in one.answers
    return right / len(test)
