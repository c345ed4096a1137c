# SPDX-License-Identifier: Apache-2.0
"""What an image or an answer becomes in a row, and which settings may change when a job resumes."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sg4v_ray.core.config import content_of, fingerprint
from sg4v_ray.core.images import ImageLimits, Rejected
from sg4v_ray.core.rejects import Reject, RejectBudget
from sg4v_ray.exactly_once.generate import judge
from sg4v_ray.exactly_once.pixels import load_image
from sg4v_ray.inference.engine import Completion
from sg4v_ray.recipes.catalogue import RECIPES


def test_an_empty_answer_is_no_caption_but_a_wrong_answer_to_a_question() -> None:
    ended = Completion((2,), "stop")
    assert judge("", ended, cut_off="reject").reject == Reject.EMPTY_TEXT
    kept = judge("", ended, cut_off="keep")
    assert (kept.text, kept.reject) == ("", None)


def test_a_file_that_may_not_be_read_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: str) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(os, "stat", denied)  # root, who runs many tests, may read anything
    found = load_image(str(tmp_path / "a.png"), limits=ImageLimits())
    assert isinstance(found, Rejected)
    assert found.reason is Reject.NOT_READABLE


def test_a_budget_may_change_on_a_resume_and_what_decides_a_caption_may_not() -> None:
    step = RECIPES["demo"]().caption
    assert step is not None
    larger = replace(step.config, budget=RejectBudget(max_reject_rate=0.5))
    other = replace(step.config, geometry="square")
    assert fingerprint(content_of(larger)) == fingerprint(content_of(step.config))
    assert fingerprint(content_of(other)) != fingerprint(content_of(step.config))
    assert replace(step.engine, capacity=1).identity == step.engine.identity
    assert replace(step.engine, max_model_len=99).identity != step.engine.identity
