# SPDX-License-Identifier: Apache-2.0
"""Chance that is the same on every machine and in any order: by the hash of an id and a seed."""

import hashlib
import heapq
from collections.abc import Iterable
from typing import Final

_BITS: Final = 64


def draw(key: str, seed: int, purpose: str) -> float:
    """Return a number from 0 up to 1 for an id; draws for other purposes are independent."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()
    return float(int.from_bytes(digest[: _BITS // 8], "big") >> 11) / 2**53


def sample(keys: Iterable[str], count: int, seed: int, purpose: str) -> list[str]:
    """Return `count` ids (all, if there are fewer) drawn without replacement, in drawn order.

    Asked for more, it returns the same ones and more: a larger sample contains a smaller one.
    """
    return heapq.nsmallest(count, keys, key=lambda key: (draw(key, seed, purpose), key))
