# SPDX-License-Identifier: Apache-2.0
"""An array is read an object at a time, whatever the pieces in which its bytes come."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.json_array import read_objects

CHUNKS = (1, 2, 7, 2**20)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', "\\", "\\u", "}]", "\U0001f600", "caf\u00e9", "\ufeff", "NaN"]
)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
ARRAYS = st.lists(OBJECTS, max_size=5)


def read(data: bytes, *, chunk: int = 2**20, limit: int = 2**20) -> list[tuple[int, int, Any]]:
    found = read_objects(io.BytesIO(data), where="a.json", chunk_bytes=chunk, max_bytes=limit)
    return [(one.index, one.offset, one.value) for one in found]


def problem_with(data: bytes, *, limit: int = 2**20) -> str:
    """Return the error, which is the same for chunks of every size."""
    texts = set()
    for chunk in CHUNKS:
        with pytest.raises(ContractError) as caught:
            read(data, chunk=chunk, limit=limit)
        texts.add(str(caught.value))
    (text,) = texts
    return text


def dumped(objects: list[Any], *, escaped: bool, pretty: bool, mark: bool) -> bytes:
    text = json.dumps(objects, ensure_ascii=escaped, indent=2 if pretty else None)
    return (b"\xef\xbb\xbf " if mark else b"") + text.encode() + (b" \r\n\t" if pretty else b"")


@settings(max_examples=150, deadline=None)
@given(ARRAYS, st.integers(1, 60), st.booleans(), st.booleans(), st.booleans())
def test_it_reads_what_json_reads_and_places_are_bytes_of_the_file(
    objects: list[Any], chunk: int, escaped: bool, pretty: bool, mark: bool
) -> None:
    data = dumped(objects, escaped=escaped, pretty=pretty, mark=mark)
    found = read(data, chunk=chunk)
    assert [value for _, _, value in found] == json.loads(data.decode("utf-8-sig"))
    assert [index for index, _, _ in found] == list(range(len(objects)))
    for _, offset, value in found:
        assert json.JSONDecoder().raw_decode(data[offset:].decode())[0] == value


@settings(max_examples=100, deadline=None)
@given(st.lists(OBJECTS, min_size=1, max_size=4), st.data(), st.booleans(), st.booleans())
def test_a_file_that_is_cut_anywhere_is_refused(
    objects: list[Any], data: st.DataObject, escaped: bool, pretty: bool
) -> None:
    whole = dumped(objects, escaped=escaped, pretty=False, mark=pretty)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    problem_with(cut)


@settings(max_examples=100, deadline=None)
@given(st.lists(OBJECTS, max_size=3), OBJECTS, st.booleans())
def test_the_byte_of_a_bad_object_is_exact(
    before: list[Any], after: dict[str, Any], escaped: bool
) -> None:
    texts = [json.dumps(one, ensure_ascii=escaped) for one in (*before, {"n": 1}, after)]
    texts[len(before)] = '{"n": 1 "m": 2}'
    data = f"[{', '.join(texts)}]".encode()
    offset = 1 + sum(len(one.encode()) + 2 for one in texts[: len(before)])
    assert f"record {len(before)} at byte {offset:,} is no JSON" in problem_with(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"", "the file is empty", id="empty file"),
        pytest.param(b'[{"a": 1}, {"b', "record 1 at byte 11 .*ends at byte 14", id="cut"),
        pytest.param(b'[{"a": 1},', "ends at byte 10, get it anew", id="cut after a comma"),
        pytest.param(b'[{"a": 1}', "']' is missing; the file ends at byte 9", id="no bracket"),
        pytest.param(b'[{"a": 1}]\n[{"a": 1}]', "write one array a file", id="two arrays"),
        pytest.param(b'[{"a": 1}] x', "follows the array.* at byte 11", id="garbage behind"),
        pytest.param(b"[]\xff", "follows the array.*byte 2 is no UTF-8", id="bytes behind"),
        pytest.param(b'[{"a": 1},]', "record 1 is no object; at byte 10", id="comma too many"),
        pytest.param(b'[{"a": 1} {"a": 1}]', "after record 0.*at byte 10", id="comma too few"),
        pytest.param(b"[[1]]", "record 0 is no object; at byte 1", id="list inside"),
        pytest.param(b'[{"a": NaN}]', "NaN is no JSON", id="NaN"),
        pytest.param(b'[{"a": -Infinity}]', "Infinity is no JSON", id="infinity"),
        pytest.param(b'[{"a": 1e999}]', "1e999 is too large", id="infinite number"),
        pytest.param(b'[{"a": ' + b"9" * 5000 + b"}]", "integer of 5,000 digits", id="huge"),
        pytest.param(b'[{"a": {"b": 1, "b": 2}}]', "'b' twice", id="key twice"),
        pytest.param(b'[{"a": ' + b"[" * 9999 + b"]" * 9999 + b"}]", "nested", id="deep"),
        pytest.param(b'[{"a": "x\ny"}]', "at byte 9 stands '.n'", id="line break in a text"),
        pytest.param(b'[{"a": "caf\xe9"}]', "byte 11 is no UTF-8", id="Latin-1"),
        pytest.param('[{"a": 1}]'.encode("utf-16"), "byte 0 is no UTF-8", id="UTF-16"),
        pytest.param(b"\x1f\x8b\x08\x00", "gunzip", id="gzip"),
    ],
)
def test_what_is_wrong_is_said_with_its_byte(data: bytes, problem: str) -> None:
    with pytest.raises(ContractError, match=f"a.json.*{problem}"):
        read(data)
    problem_with(data)


def test_an_object_that_never_ends_does_not_fill_the_memory() -> None:
    assert read(b'[{"a": "1234567890"}]', limit=19)
    for data in (b'[{"a": "1234567890"}]', b'[{"a": "' + b"x" * 999, b'[{"a":' + b"[" * 99):
        assert "record 0 at byte 1 is longer than 18 bytes" in problem_with(data, limit=18)


def test_an_error_comes_after_the_objects_before_it() -> None:
    found = read_objects(io.BytesIO(b'[{"a": 1}, {"a": "\xff"}]'), where="a.json")
    assert next(found).value == {"a": 1}
    with pytest.raises(ContractError, match=r"record 1 at byte 11 .*byte 18 is no UTF-8"):
        next(found)
