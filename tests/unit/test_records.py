# SPDX-License-Identifier: Apache-2.0
"""Records survive storage unchanged, and a table that is not theirs is refused by name."""

import pyarrow as pa
import pytest

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.records import (
    CaptionRow,
    ImageRow,
    Prediction,
    Question,
    Sample,
    Turn,
    from_table,
    to_table,
)

ROWS = [
    ImageRow(id="a", source="coco", uri="/a.jpg", size_bytes=7),
    Sample(
        id="a",
        source="coco",
        uri=None,
        turns=(Turn(role="user", text="?"), Turn(role="assistant", text="!")),
    ),
    Question(id="q", image_id="a", uri="/a.jpg", text="what?", answers=("red", "dark red")),
    CaptionRow(
        id="a",
        source="coco",
        uri="/a.jpg",
        text=None,
        num_tokens=0,
        finish_reason=None,
        reject="truncated",
        reject_detail="JPEG",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_a_record_comes_back_as_it_went(row: object) -> None:
    table = to_table(type(row), [row, row])
    assert from_table(type(row), table, where="here") == [row, row]


def test_a_missing_column_is_named() -> None:
    table = to_table(ImageRow, [ROWS[0]]).drop_columns(["uri"])
    with pytest.raises(ContractError, match=r"images@v1 has no column 'uri'"):
        from_table(ImageRow, table, where="images@v1")


def test_a_column_of_another_type_is_named() -> None:
    table = to_table(ImageRow, [ROWS[0]])
    table = table.set_column(3, "size_bytes", pa.array(["7"]))
    with pytest.raises(ContractError, match=r"'size_bytes' is string, ImageRow needs int64"):
        from_table(ImageRow, table, where="here")


def test_a_newer_writer_may_add_columns() -> None:
    table = to_table(ImageRow, [ROWS[0]]).append_column("width", pa.array([3]))
    assert from_table(ImageRow, table, where="here") == [ROWS[0]]


def test_a_turn_has_one_of_two_roles() -> None:
    with pytest.raises(ContractError, match="'human'"):
        Turn(role="human", text="?")


def test_predictions_carry_their_question() -> None:
    names = set(Question.__dataclass_fields__)
    assert names <= set(Prediction.__dataclass_fields__)
