# SPDX-License-Identifier: Apache-2.0
"""Chance that is the same on every machine and in any order: by the hash of an id and a seed."""

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys


def digest(key: str, seed: int, purpose: str) -> bytes:
    """Return 32 bytes that order ids by chance; for other purposes the order is independent."""
    return hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()


def draw(key: str, seed: int, purpose: str) -> float:
    """Return a number from 0 up to 1 for an id; draws for other purposes are independent."""
    first = int.from_bytes(digest(key, seed, purpose)[:8], "big")
    return float(first >> 11) / 2**53  # all bits that a float has


def sample(keys: Iterable[str], count: int, seed: int, purpose: str) -> list[str]:
    """Return `count` ids (all, if there are fewer) drawn without replacement, in drawn order.

    Asked for more, it returns the same ones and more: a larger sample contains a smaller one.
    """
    return heapq.nsmallest(count, keys, key=lambda key: (draw(key, seed, purpose), key))


@identity_keys("HoldOut", per_source="per_source", seed="seed")
@dataclass(frozen=True, kw_only=True, slots=True)
class HoldOut:
    """Rows that people read and nothing is trained on: so many of each source, by seed."""

    per_source: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_source < 0:
            raise ConfigError(f"per_source must be 0 or more, got {self.per_source}")

    def of(self, rows: Iterable[tuple[str, str]]) -> set[str]:
        """Return the ids that are held out of rows, each an id and its source."""
        by_source: dict[str, list[str]] = {}
        for key, source in rows:
            by_source.setdefault(source, []).append(key)
        return {
            key
            for ids in by_source.values()
            for key in sample(ids, self.per_source, self.seed, "hold-out")
        }
