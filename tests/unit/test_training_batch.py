# SPDX-License-Identifier: Apache-2.0
"""From samples to tensors: what is expanded, cut, padded, and what becomes a row without weight."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from sg4v_ray.core.errors import ContractError
from sg4v_ray.model.conversation import IGNORE
from sg4v_ray.training.batch import NO_LABELS, MicroBatch, Rows, collate
from sg4v_ray.training.plan import FILLER
from sg4v_ray.training.samples import Samples
from tests.unit.rows_site import (
    PIXELS,
    RULES,
    SIDE,
    TOKENS_AN_IMAGE,
    make_batches,
    open_rows,
    write_samples,
)

pytestmark = pytest.mark.training


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_samples(tmp_path)


def _batch(rows: Rows, *indexes: int) -> MicroBatch:
    made = [rows(index) for index in indexes]
    return collate(made, PIXELS, filler=rows.filler, pad=rows.pad_token_id)


def _is_image(made: MicroBatch) -> torch.Tensor:
    return made.input_ids_BT == 4


def test_samples_are_found_in_any_record_batch_of_the_file(file: Path) -> None:
    samples = Samples(file)
    assert len(samples) == 5
    assert [samples[i].id for i in (4, 0, 2, 3, 1)] == [
        "long",
        "good",
        "missing",
        "broken",
        "text only",
    ]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), pa.schema([("id", pa.string())])) as writer:
        writer.write_table(pa.table({"id": ["a"]}))
    with pytest.raises(ContractError, match="no column 'source'"):
        Samples(tmp_path / "x.arrow")


def test_an_image_takes_as_many_tokens_as_the_model_makes_of_it(
    file: Path, tiny_model: Path
) -> None:
    made = _batch(open_rows(file, tiny_model), 0)
    assert int(_is_image(made).sum()) == TOKENS_AN_IMAGE
    assert made.pixels_N3SS.shape == (1, 3, SIDE, SIDE)
    assert set(made.labels_BT[_is_image(made)].tolist()) == {IGNORE}


def test_short_rows_are_padded_on_the_right_and_the_padding_weighs_nothing(
    file: Path, tiny_model: Path
) -> None:
    made = _batch(open_rows(file, tiny_model), 0, 4)
    padding = made.attention_mask_BT[0] == 0
    assert 0 < int(padding.sum()) == len(padding) - int(made.attention_mask_BT[0].sum())
    assert bool(padding[-1]) and not bool(padding[0])
    assert set(made.input_ids_BT[0][padding].tolist()) == {3}
    assert set(made.labels_BT[0][padding].tolist()) == {IGNORE}
    assert made.counts["tokens"] == int(made.attention_mask_BT.sum())
    assert made.counts["labels"] == int((made.labels_BT[:, 1:] != IGNORE).sum())


def test_a_batch_without_an_image_gets_a_row_with_one_that_weighs_nothing(
    file: Path, tiny_model: Path
) -> None:
    made = _batch(open_rows(file, tiny_model), 1)
    assert made.input_ids_BT.shape[0] == 2
    assert made.pixels_N3SS.shape[0] == 1
    assert int(_is_image(made)[1].sum()) == TOKENS_AN_IMAGE
    assert set(made.labels_BT[1].tolist()) == {IGNORE}
    assert made.counts["samples"] == 1


@pytest.mark.parametrize(("index", "reason"), [(2, "missing"), (3, "truncated")])
def test_a_bad_image_keeps_its_place_without_weight_and_is_counted_by_reason(
    file: Path, tiny_model: Path, index: int, reason: str
) -> None:
    made = _batch(open_rows(file, tiny_model), 0, index)
    assert made.input_ids_BT.shape[0] == made.pixels_N3SS.shape[0] == 2
    assert set(made.labels_BT[1].tolist()) == {IGNORE}
    assert made.counts["samples"] == 2
    assert made.counts["rejected"] == made.counts[f"rejected_{reason}"] == 1


def test_fillers_are_no_samples(file: Path, tiny_model: Path) -> None:
    made = _batch(open_rows(file, tiny_model), FILLER, FILLER)
    assert made.counts["samples"] == made.counts["labels"] == made.counts["rejected"] == 0
    assert made.pixels_N3SS.shape[0] == 2


def test_a_long_answer_is_cut_and_counted(file: Path, tiny_model: Path) -> None:
    whole = _batch(open_rows(file, tiny_model), 4)
    limit = whole.input_ids_BT.shape[1] - 10
    made = _batch(open_rows(file, tiny_model, replace(RULES, max_length=limit)), 4)
    assert made.counts["cut"] == 1 and whole.counts["cut"] == 0
    assert torch.equal(made.labels_BT[0], whole.labels_BT[0, :limit])


def test_a_sample_without_a_label_left_is_counted_like_a_bad_image(
    file: Path, tiny_model: Path
) -> None:
    made = _batch(open_rows(file, tiny_model, replace(RULES, max_length=12)), 0)
    assert made.counts[f"rejected_{NO_LABELS}"] == made.counts["rejected"] == 1
    assert int(_is_image(made).sum()) == TOKENS_AN_IMAGE, "an image is never cut in two"


def test_rows_are_kept_only_while_they_fit(file: Path, tiny_model: Path) -> None:
    rows = open_rows(file, tiny_model)
    assert rows(0) is rows(0)
    rows = open_rows(file, tiny_model, kept_bytes=0)
    assert rows(0) is not rows(0)


def test_a_resumed_worker_makes_the_batches_that_it_would_have_made(
    file: Path, tiny_model: Path
) -> None:
    batches = make_batches(open_rows(file, tiny_model))
    whole, rest = list(batches.steps(0)), list(batches.steps(3))
    assert (len(whole), len(rest)) == (5, 2)
    for (before,), (after,) in zip(whole[3:], rest, strict=True):
        assert torch.equal(before.input_ids_BT, after.input_ids_BT)
        assert torch.equal(before.pixels_N3SS, after.pixels_N3SS)
    assert list(batches.steps(5)) == []
