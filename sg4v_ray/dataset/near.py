# SPDX-License-Identifier: Apache-2.0
"""Images that look alike, found by their perceptual hashes in time that grows with their number.

Two hashes of 64 bits that differ in at most `d` bits agree in at least one of `d + 1` bands. So
only hashes that share a band are compared, not all pairs of 1.2 million.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sg4v_ray.core.errors import ConfigError

MAX_DISTANCE: Final = 7
_BITS: Final = 64
_CHUNK: Final = 4096


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and one that looks like it and stands before it."""

    item: int
    like: int
    distance: int
    """Bits in which their hashes differ."""


def near_pairs(
    hashes: npt.NDArray[np.uint64], *, max_distance: int, first: int | None = None
) -> list[Pair]:
    """Return for every hash that is near an earlier one the nearest such, the earliest of equals.

    Args:
        hashes: (N,) perceptual hashes, in the order in which images are preferred.
        max_distance: bits in which two may differ, 0 to 7.
        first: compare with the first so many only; None compares with every earlier one.

    Raises:
        ConfigError: `max_distance` is outside of that.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ConfigError(f"max_distance must be 0 to {MAX_DISTANCE} bits, got {max_distance}")
    nearest: dict[int, tuple[int, int]] = {}
    first = len(hashes) if first is None else first
    for band in _bands(hashes, max_distance + 1):
        order = np.argsort(band, kind="stable")  # of equal bands the earlier image comes first
        edges = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, edges):
            if len(group) > 1:
                _compare(hashes, group, first, max_distance, nearest)
    return [Pair(item, like, distance) for item, (distance, like) in sorted(nearest.items())]


def _bands(hashes: npt.NDArray[np.uint64], count: int) -> list[npt.NDArray[np.uint64]]:
    edges = np.linspace(0, _BITS, count + 1).astype(int)
    masks = [(1 << int(high - low)) - 1 for low, high in itertools.pairwise(edges)]
    return [
        (hashes >> np.uint64(low)) & np.uint64(mask)
        for low, mask in zip(edges[:-1], masks, strict=True)
    ]


def _compare(
    hashes: npt.NDArray[np.uint64],
    group: npt.NDArray[np.intp],
    first: int,
    max_distance: int,
    nearest: dict[int, tuple[int, int]],
) -> None:
    """Compare a group with those of it that are among the first, a few thousand rows at a time."""
    group = np.sort(group)
    others = group[group < first]
    for start in range(0, len(group), _CHUNK):
        rows = group[start : start + _CHUNK]
        distances = np.bitwise_count(hashes[rows][:, None] ^ hashes[others][None, :])
        is_earlier = others[None, :] < rows[:, None]
        near = is_earlier & (distances <= max_distance)
        for row in np.flatnonzero(near.any(axis=1)):
            columns = np.flatnonzero(near[row])
            best = columns[np.argmin(distances[row, columns])]
            found = (int(distances[row, best]), int(others[best]))
            item = int(rows[row])
            nearest[item] = min(found, nearest.get(item, found))


def as_numbers(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Read hashes of 16 hex digits as numbers."""
    return np.array([int(one, 16) for one in texts], np.uint64)
