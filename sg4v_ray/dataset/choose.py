# SPDX-License-Identifier: Apache-2.0
"""Which captions come into a mix, and where they stand in it.

The order of captions is that of a hash of seed and id: a random sample, always the same one,
however the caption file is sorted.
"""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.json_array import Element
from sg4v_ray.core.sampling import digest
from sg4v_ray.dataset.layout import SOURCES, source_of


@identity_keys("MixShare", name_in_0_1="Share", source="source", captions="captions")
@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How many captions of one source come in."""

    source: str
    """As `dataset.layout` names it: coco, lcs, sam, textcaps, wikiart, web-landmark, ..."""
    captions: int

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(f"no source {self.source!r}; there are {', '.join(sorted(SOURCES))}")
        if self.captions < 1:
            raise ConfigError(f"captions of {self.source} must be at least 1, got {self.captions}")


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One record of the caption file, without its text."""

    order: bytes
    """By chance, of seed and id; then of image and caption, for ids that repeat."""
    index: int
    id: str
    source: str
    image: str


@dataclass(frozen=True, slots=True)
class Place:
    """A record that goes out, and so a place for one that comes in."""

    index: int
    id: str
    source: str
    image: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What comes in."""

    captions: list[Candidate]
    missing: dict[str, int]
    """Captions that were wanted and are not there, by source; `any` where any would do."""


def candidate(element: Element, *, image: str, seed: int) -> Candidate:
    """Return what choosing needs of a caption record.

    Args:
        image: the record's image as the mix names it.
    """
    key, text = str(element.value["id"]), element.value["conversations"][1]["value"]
    content = hashlib.sha256(f"{image}\n{text}".encode()).digest()
    order = digest(key, seed, "mix") + content[:8]
    return Candidate(order, element.index, key, source_of(image), image)


def choose_equal(pool: Iterable[Candidate], removed: Sequence[Place]) -> Choice:
    """Choose as many captions as go out: of the same images, then sources, then of any."""
    same_image, rest = _take(
        sorted(pool), Counter(one.image for one in removed), lambda one: one.image
    )
    sources = Counter(one.source for one in removed)
    sources.subtract(one.source for one in same_image)
    same_source, rest = _take(rest, sources, lambda one: one.source)
    taken = same_image + same_source
    taken += rest[: len(removed) - len(taken)]
    missing = len(removed) - len(taken)
    return Choice(sorted(taken), {"any": missing} if missing else {})


def choose_shares(pool: Iterable[Candidate], shares: Sequence[Share]) -> Choice:
    """Choose the wanted number of captions of each source."""
    wanted = Counter({one.source: one.captions for one in shares})
    taken, _ = _take(sorted(pool), wanted, lambda one: one.source)
    wanted.subtract(one.source for one in taken)
    return Choice(taken, {source: count for source, count in wanted.items() if count})


def seats(
    captions: Sequence[Candidate], removed: Sequence[Place]
) -> tuple[dict[int, Candidate], list[Candidate]]:
    """Return who stands at the place of which removed record, and who finds no place.

    A caption stands at the place of a record about its image, where there is one; the others take
    the places that are left from first to last, in their own order. Places may stay empty.
    """
    by_image: dict[str, deque[int]] = defaultdict(deque)
    for place in removed:
        by_image[place.image].append(place.index)
    seated: dict[int, Candidate] = {}
    others = deque[Candidate]()
    for one in captions:
        if places := by_image.get(one.image):
            seated[places.popleft()] = one
        else:
            others.append(one)
    for place in removed:
        if others and place.index not in seated:
            seated[place.index] = others.popleft()
    return seated, list(others)


def _take(
    pool: Iterable[Candidate], wanted: Counter[str], key: Callable[[Candidate], str]
) -> tuple[list[Candidate], list[Candidate]]:
    """Divide a pool into those that are wanted, at most so many of a key, and the others."""
    left = Counter(wanted)
    taken: list[Candidate] = []
    others: list[Candidate] = []
    for one in pool:
        if left[key(one)] > 0:
            left[key(one)] -= 1
            taken.append(one)
        else:
            others.append(one)
    return taken, others
