# SPDX-License-Identifier: Apache-2.0
"""Near duplicates are found exactly: no pair within the distance is missed, none beyond it told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.dataset.near import Pair, near_pairs

BASE = 0x0123456789ABCDEF


def flipped(bits: list[int]) -> int:
    value = BASE
    for bit in bits:
        value ^= 1 << bit
    return value


@given(
    flips=st.lists(st.lists(st.integers(0, 63), max_size=9, unique=True), min_size=1, max_size=30),
    distance=st.integers(0, 7),
    first=st.none() | st.integers(0, 30),
)
def test_every_hash_gets_the_nearest_earlier_one(
    flips: list[list[int]], distance: int, first: int | None
) -> None:
    hashes = [flipped(bits) for bits in flips]
    wanted = []
    for item, one in enumerate(hashes):
        earlier = hashes[:item][:first]
        near = [((one ^ other).bit_count(), like) for like, other in enumerate(earlier)]
        if near and min(near)[0] <= distance:
            wanted.append(Pair(item, min(near)[1], min(near)[0]))
    found = near_pairs(np.array(hashes, np.uint64), max_distance=distance, first=first)
    assert found == wanted


def test_no_hashes_have_no_pairs() -> None:
    assert near_pairs(np.array([], np.uint64), max_distance=4) == []


def test_a_distance_that_the_bands_cannot_promise_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_distance must be 0 to 7 bits, got 8"):
        near_pairs(np.array([1], np.uint64), max_distance=8)
