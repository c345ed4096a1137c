# SPDX-License-Identifier: Apache-2.0
"""The figures that `make demo` and `make loop` left are those that the README promises."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.shown

RUNS = Path(__file__).parents[2] / "runs"


def test_the_demo_captions_all_images_and_names_what_is_in_them() -> None:
    report = json.loads((RUNS / "demo/report.json").read_text())
    assert (report["captioned"], report["rejected"]) == (1000, 0)
    assert (report["right_shape_of"], report["right_colour_of"]) == (954, 922)
    assert report["right_shape"] >= 0.97
    assert report["right_colour"] >= 0.98
    assert report["images_per_s"] > 0
    assert "<html" in (RUNS / "demo/gallery.html").read_text()


def test_the_loop_answers_the_official_questions() -> None:
    scores = json.loads((RUNS / "easy-vqa/scores.json").read_text())
    assert scores["questions"] == 9673
    assert scores["rejected"] == 0
    assert scores["vqa_accuracy"] >= 0.90
    assert scores["commonest_answer_accuracy"] < 0.70
