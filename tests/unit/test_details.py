# SPDX-License-Identifier: Apache-2.0
"""What counts as one of LLaVA's detailed captions, and from where an image is."""

import pytest

from sg4v_ray.dataset.details import (
    QUESTIONS_OF_THE_FILE,
    QUESTIONS_OF_THE_PAPER,
    asks_for_detail,
)
from sg4v_ray.dataset.layout import SOURCES, source_of
from sg4v_ray.sources.catalogue import CATALOGUE

pytestmark = pytest.mark.teacher

COCO = "coco/train2017/000000000009.jpg"


def asked(*said: str, image: str | None = COCO) -> bool:
    speakers = ("human", "gpt") * len(said)
    turns = [{"from": who, "value": text} for who, text in zip(speakers, said, strict=False)]
    return asks_for_detail(
        {"id": "1", "conversations": turns} | ({"image": image} if image else {})
    )


@pytest.mark.parametrize("question", {*QUESTIONS_OF_THE_FILE, *QUESTIONS_OF_THE_PAPER})
def test_each_question_of_the_file_and_of_the_paper_counts_wherever_the_image_stands(
    question: str,
) -> None:
    assert asked(f"{question}\n<image>", "In the image ...")
    assert asked(f"<image>\n{question.removesuffix('.')}.", "In the image ...")
    assert asked(f"<image>{question} ", "x", image="000000000009.jpg"), "as in LLaVA-Instruct-158K"


@pytest.mark.parametrize(
    ("said", "image"),
    [
        pytest.param(("Describe the following image.", "x", "And?", "y"), COCO, id="more turns"),
        pytest.param(("Describe the following image.",), COCO, id="no answer"),
        pytest.param(("Describe the following image.", "x"), "gqa/images/1.jpg", id="other source"),
        pytest.param(("Describe the following image.", "x"), "a/000000000009.jpg", id="elsewhere"),
        pytest.param(("Describe the following image.", "x"), None, id="text alone"),
        pytest.param(("Describe the following image concisely.", "x"), COCO, id="short caption"),
        pytest.param(("describe the following image.", "x"), COCO, id="other letters"),
    ],
)
def test_anything_else_is_none(said: tuple[str, ...], image: str | None) -> None:
    assert not asked(*said, image=image)


def test_the_file_asks_eleven_questions_of_the_length_that_is_reported_of_it() -> None:
    assert len(set(QUESTIONS_OF_THE_FILE)) == 11
    assert round(sum(map(len, QUESTIONS_OF_THE_FILE)) / 11, 1) == 44.5
    assert len(set(QUESTIONS_OF_THE_PAPER)) == 16


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_sources_are_those_of_the_catalogue(name: str) -> None:
    assert source_of(f"{CATALOGUE[name].layout}/x.jpg") == name


@pytest.mark.parametrize(
    ("image", "source"),
    [
        (None, "text"),
        ("000000000009.jpg", "coco"),
        ("9.jpg", "other"),
        ("vg/VG_100K_2/2404787.jpg", "vg"),
        ("textvqa/train_images/0a.jpg", "textvqa"),
        ("ocr_vqa/images/1.jpg", "ocr-vqa"),
        ("coconut/1.jpg", "other"),
    ],
)
def test_a_source_is_told_by_the_first_folder(image: str | None, source: str) -> None:
    assert source_of(image) == source
    assert source in {*SOURCES, "text"}
