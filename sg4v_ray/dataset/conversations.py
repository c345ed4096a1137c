# SPDX-License-Identifier: Apache-2.0
"""Published conversations as training data: a LLaVA JSON of somebody's, or a mix of ours."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.json_array import Element
from sg4v_ray.core.llava_file import check_place, digest_at, records_at
from sg4v_ray.core.llava_json import turns_of
from sg4v_ray.core.records import Sample
from sg4v_ray.core.storage import Storage
from sg4v_ray.dataset.layout import source_of


@identity_keys("JsonPart", json="json", images="images")
@dataclass(frozen=True, kw_only=True, slots=True)
class JsonPart:
    """The conversations of a LLaVA JSON as they stand there."""

    json: str
    """Absolute path or URI of the file."""
    images: str
    """Absolute path or URI of the folder that the records' `image` paths are relative to."""

    def __post_init__(self) -> None:
        check_place(self.json)
        check_place(f"{self.images.rstrip('/')}/")


@identity_keys("MixPart", mix="mix", images="images")
@dataclass(frozen=True, kw_only=True, slots=True)
class MixPart:
    """The conversations of a finished mix (`jobs.mix_dataset`)."""

    mix: Ref
    images: str
    """Absolute path or URI of the folder that the records' `image` paths are relative to."""

    def __post_init__(self) -> None:
        check_place(f"{self.images.rstrip('/')}/")


def file_of(storage: Storage, part: JsonPart | MixPart) -> str:
    """Return where the JSON of a part lies.

    Raises:
        ArtifactMissing: the mix is not finished.
    """
    if isinstance(part, JsonPart):
        return part.json
    return storage.uri(f"{part.mix.path}/{find(storage, part.mix).config['file']}")


def inputs_of(storage: Storage, part: JsonPart | MixPart) -> dict[str, str]:
    """Return what the samples of a part depend on: a mix by its fingerprint, a file by its bytes.

    Raises:
        ArtifactMissing: the mix is not finished.
        ConfigError: there is no such file.
    """
    if isinstance(part, JsonPart):
        return {part.json: digest_at(part.json)[:16]}
    return {str(part.mix): find(storage, part.mix).fingerprint}


def samples(
    storage: Storage, part: JsonPart | MixPart, counts: Counter[str], *, show: bool
) -> Iterator[Sample]:
    """Yield the conversations of a part, one after the other.

    Raises:
        ContractError: the file is no LLaVA JSON.
    """
    file = file_of(storage, part)
    elements = records_at(file, bar="conversations" if show else None)
    return samples_of(elements, images=part.images, counts=counts)


def samples_of(
    elements: Iterable[Element], *, images: str, counts: Counter[str]
) -> Iterator[Sample]:
    """Turn records into samples.

    LLaVA's mix repeats ids: the second record of one gets `#2` behind it, and so on. A last
    question that nobody answers teaches nothing and is cut off.
    """
    root = images.rstrip("/")
    seen: Counter[str] = Counter()
    for element in elements:
        record, turns = element.value, turns_of(element.value)
        if turns[-1].role == "user":
            counts["unanswered_questions"] += 1
            turns = turns[:-1]
        if not turns:
            counts["left_out_no_answer"] += 1
            continue
        image = record.get("image")
        yield Sample(
            id=_unique(str(record["id"]), seen),
            source=source_of(image),
            uri=None if image is None else f"{root}/{image}",
            turns=turns,
        )


def _unique(key: str, seen: Counter[str]) -> str:
    """Return the id, or with the first number behind it that makes it new; note it as seen."""
    seen[key] += 1
    if seen[key] == 1:
        return key
    return _unique(f"{key}#{seen[key]}", seen)
