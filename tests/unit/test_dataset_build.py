# SPDX-License-Identifier: Apache-2.0
"""Training data: captions and questions become conversations, and what is left out is counted."""

from pathlib import Path

import pyarrow as pa
import pytest

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ArtifactMissing, ConfigError, ContractError
from sg4v_ray.core.records import CaptionRow, Question, Sample, from_table
from sg4v_ray.core.where import Where
from sg4v_ray.dataset.build import BuildConfig, CaptionsPart, QuestionsPart, run, shrink
from tests.row_artifacts import finish_rows

CAPTIONS, QUESTIONS, OUT = Ref(name="captions"), Ref(name="questions"), Ref(name="data")


def caption(key: str, text: str | None, reject: str | None = None) -> CaptionRow:
    return CaptionRow(
        id=key,
        source="coco",
        uri=f"/{key}.jpg",
        text=text,
        num_tokens=3,
        finish_reason="stop" if text else None,
        reject=reject,
        reject_detail=reject,
    )


@pytest.fixture
def where(tmp_path: Path) -> Where:
    where = Where(root=str(tmp_path / "root"))
    captions = [
        caption("a", "A red circle."),
        caption("b", None, "truncated"),
        caption("c", "Blue triangle, no circle."),
        caption("d", "A dog."),
    ]
    questions = [
        Question(id=f"q{n}", image_id="x", uri="/x.png", text=f"is it {n}?", answers=(str(n),))
        for n in range(6)
    ]
    for ref, record, rows in ((CAPTIONS, CaptionRow, captions), (QUESTIONS, Question, questions)):
        finish_rows(where.storage, ref, record, rows)
    return where


def built(where: Where) -> list[Sample]:
    data = where.storage.get(f"{OUT.path}/samples.arrow")
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    return from_table(Sample, table, where="data")


def test_captions_become_conversations_and_rejects_are_counted(where: Where) -> None:
    config = BuildConfig(parts=(CaptionsPart(captions=CAPTIONS),), seed=1)
    manifest = run(config, out=OUT, where=where)
    samples = built(where)
    assert [one.id for one in samples] == ["a", "c", "d"]
    assert [turn.role for turn in samples[0].turns] == ["user", "assistant"]
    assert samples[0].turns[1].text == "A red circle."
    assert manifest.counts["samples"] == 3
    assert manifest.counts["left_out_truncated"] == 1
    assert "truncated | 1" in where.storage.get(f"{OUT.path}/README.md").decode()


def test_all_questions_of_an_image_are_one_conversation(where: Where) -> None:
    run(BuildConfig(parts=(QuestionsPart(questions=QUESTIONS),), seed=1), out=OUT, where=where)
    (sample,) = built(where)
    asked = [turn.text for turn in sample.turns if turn.role == "user"]
    answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    assert sorted(asked) == [f"is it {n}?" for n in range(6)]
    assert asked != sorted(asked), "the order is drawn by the seed"
    assert asked == [f"is it {answer}?" for answer in answers]


def test_shrunken_captions_count_what_they_cannot_shrink(where: Where) -> None:
    part = CaptionsPart(captions=CAPTIONS, only_words=("circle", "triangle"))
    manifest = run(BuildConfig(parts=(part,), seed=1), out=OUT, where=where)
    assert [one.turns[1].text for one in built(where)] == ["circle", "circle triangle"]
    assert manifest.counts["left_out_without_word"] == 1


def test_words_stand_in_the_order_of_the_list_and_count_once_and_parts_of_words_do_not() -> None:
    words = ("red", "circle", "triangle")
    assert shrink("The circle is red. Red: a circle.", words) == "red circle"
    assert shrink("circles", words) is None


def test_two_parts_must_not_share_ids(where: Where) -> None:
    twice = (CaptionsPart(captions=CAPTIONS), CaptionsPart(captions=CAPTIONS))
    with pytest.raises(ContractError, match="a sample 'a'"):
        run(BuildConfig(parts=twice, seed=1), out=OUT, where=where)


def test_nothing_left_is_an_error(where: Where) -> None:
    part = CaptionsPart(captions=CAPTIONS, only_words=("square",))
    with pytest.raises(ContractError, match="would be empty"):
        run(BuildConfig(parts=(part,), seed=1), out=OUT, where=where)


def test_an_unfinished_part_is_named(where: Where) -> None:
    part = CaptionsPart(captions=Ref(name="later"))
    with pytest.raises(ArtifactMissing, match="later@v1 is not finished"):
        run(BuildConfig(parts=(part,), seed=1), out=OUT, where=where)


def test_a_dataset_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one part"):
        BuildConfig(parts=(), seed=1)
