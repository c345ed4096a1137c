# SPDX-License-Identifier: Apache-2.0
"""Thresholds over scores decide what is trained on, and the dataset says what each removed."""

from pathlib import Path

import pytest

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.records import CaptionRow, ScoreRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.dataset import build
from sg4v_ray.dataset.build import BuildConfig, CaptionsPart
from sg4v_ray.dataset.filter import CaptionFilter, left_out
from tests.row_artifacts import finish_rows

CAPTIONS, SCORES = Ref(name="captions"), Ref(name="scores")
FAR = {"a": 0x00000000FFFFFFFF, "b": 0xFFFFFFFF00000000, "c": 0x0F0F0F0F0F0F0F0F}


def score(
    key: str, phash: int, *, clip: float | None = 1.0, worst: float | None = None
) -> ScoreRow:
    return ScoreRow(
        id=key,
        is_caption=True,
        phash=f"{phash:016x}",
        clip_score=clip,
        worst_clip_score=clip if worst is None else worst,
        reject=None,
        reject_detail=None,
    )


def evaluation_image(key: str, phash: int) -> ScoreRow:
    return ScoreRow(
        id=f"tests@v1/{key}",
        is_caption=False,
        phash=f"{phash:016x}",
        clip_score=None,
        worst_clip_score=None,
        reject=None,
        reject_detail=None,
    )


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def finish(storage: Storage, ref: Ref, record: type, rows: list, **inputs: str) -> None:
    finish_rows(storage, ref, record, rows, inputs=inputs)


def write(storage: Storage, scores: list[ScoreRow]) -> None:
    captions = [
        CaptionRow(
            id=row.id,
            source="s",
            uri="/x.png",
            text="A red circle.",
            num_tokens=4,
            finish_reason="stop",
            reject=None,
            reject_detail=None,
        )
        for row in scores
        if row.is_caption
    ]
    finish(storage, CAPTIONS, CaptionRow, captions)
    inputs = {str(CAPTIONS): find(storage, CAPTIONS).fingerprint}
    finish(storage, SCORES, ScoreRow, scores, **inputs)


def test_without_thresholds_only_what_has_no_score_is_left_out(storage: Storage) -> None:
    write(storage, [score("a", FAR["a"]), score("b", FAR["a"], clip=None)])
    assert left_out(storage, CaptionFilter(scores=SCORES), CAPTIONS) == {"b": "no_score"}


def test_captions_that_fit_badly_are_left_out(storage: Storage) -> None:
    rows = [score("a", FAR["a"]), score("b", FAR["b"], clip=0.4), score("c", FAR["c"], worst=0.1)]
    write(storage, rows)
    config = CaptionFilter(scores=SCORES, min_clip_score=0.5, min_worst_clip_score=0.3)
    found = left_out(storage, config, CAPTIONS)
    assert found == {"b": "low_clip_score", "c": "low_worst_clip_score"}


def test_of_images_that_look_alike_the_first_is_kept(storage: Storage) -> None:
    write(storage, [score("a", FAR["a"]), score("b", FAR["a"] ^ 0b11), score("c", FAR["c"])])
    near = CaptionFilter(scores=SCORES, max_duplicate_bits=2)
    assert left_out(storage, near, CAPTIONS) == {"b": "near_duplicate"}
    nearer = CaptionFilter(scores=SCORES, max_duplicate_bits=1)
    assert left_out(storage, nearer, CAPTIONS) == {}


def test_an_image_that_is_left_out_anyway_takes_no_other_with_it(storage: Storage) -> None:
    write(storage, [score("a", FAR["a"], clip=0.1), score("b", FAR["a"])])
    config = CaptionFilter(scores=SCORES, min_clip_score=0.5, max_duplicate_bits=4)
    assert left_out(storage, config, CAPTIONS) == {"a": "low_clip_score"}


def test_images_like_those_of_an_evaluation_set_are_left_out(storage: Storage) -> None:
    rows = [score("a", FAR["a"]), score("b", FAR["b"] ^ 1), evaluation_image("t", FAR["b"])]
    write(storage, rows)
    config = CaptionFilter(scores=SCORES, max_contamination_bits=3)
    assert left_out(storage, config, CAPTIONS) == {"b": "contaminated"}


def test_the_dataset_says_what_each_threshold_removed(storage: Storage) -> None:
    rows = [score("a", FAR["a"]), score("b", FAR["a"]), score("c", FAR["c"], clip=0.1)]
    write(storage, rows)
    part = CaptionsPart(
        captions=CAPTIONS,
        filter=CaptionFilter(scores=SCORES, min_clip_score=0.5, max_duplicate_bits=0),
    )
    where = Where(root=storage.root, progress=False)
    manifest = build.run(BuildConfig(parts=(part,), seed=1), out=Ref(name="data"), where=where)
    assert manifest.counts["samples"] == 1
    assert manifest.counts["left_out_near_duplicate"] == 1
    assert manifest.counts["left_out_low_clip_score"] == 1
    assert str(SCORES) in manifest.inputs


def test_contamination_without_an_evaluation_image_is_refused(storage: Storage) -> None:
    write(storage, [score("a", FAR["a"])])
    config = CaptionFilter(scores=SCORES, max_contamination_bits=3)
    with pytest.raises(ContractError, match="no evaluation image to compare with"):
        left_out(storage, config, CAPTIONS)


def test_scores_of_other_captions_are_refused(storage: Storage) -> None:
    write(storage, [score("a", FAR["a"])])
    finish(storage, Ref(name="other"), CaptionRow, [])
    with pytest.raises(ContractError, match="not of other@v1"):
        left_out(storage, CaptionFilter(scores=SCORES), Ref(name="other"))


def test_a_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_clip_score must be 0 to 2\.5, got 3"):
        CaptionFilter(scores=SCORES, min_clip_score=3)
