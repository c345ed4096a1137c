# SPDX-License-Identifier: Apache-2.0
"""Put a teacher's captions in the place of the detailed captions of an instruction set.

LLaVA JSON, captions in the same schema -> one mix and what was replaced by what -> sft-mix@v

Both files are read twice and neither is held: first to see what goes and to choose what comes,
then to write. Section 3.2 and figure 2 of the paper; the same mix serves LLaVA and Qwen-VL-Chat.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.json_array import Element
from sg4v_ray.core.lease import hold
from sg4v_ray.core.llava_file import check_place, digest_at, records_at
from sg4v_ray.core.llava_json import write_records
from sg4v_ray.core.where import Where
from sg4v_ray.dataset import details, mix_report
from sg4v_ray.dataset.choose import (
    Candidate,
    Choice,
    Place,
    Share,
    candidate,
    choose_equal,
    choose_shares,
    seats,
)
from sg4v_ray.dataset.layout import is_bare, source_of

REPORT: Final = "report.json"
CARD: Final = "README.md"
REPLACED: Final = "replaced.jsonl"

PUBLISHED: Final = (
    Share(source="coco", captions=9_000),
    Share(source="sam", captions=9_000),
    Share(source="lcs", captions=3_002),
    Share(source="textcaps", captions=500),
    Share(source="wikiart", captions=500),
    Share(source="web-landmark", captions=500),
    Share(source="web-celebrity", captions=498),
)
"""The 23,000 captions of `sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json`.

The name says 9K, 3K, 9K and 2K diverse ones. Of the diverse sources the 100K captions hold 1,998;
that the two others are of LCS is ours, so that the mix has the published 665,058 records."""


@identity_keys(
    "MixConfig",
    sft="sft",
    captions="captions",
    seed="seed",
    take="take",
    details="details",
    expect_removed="expect_removed",
    allow_missing="allow_missing",
    coco_folder="coco_folder",
    file="file",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig:
    """What is replaced by what."""

    sft: str
    """Instruction data: absolute path or URI of a LLaVA JSON."""
    captions: str
    """Captions that come in: a LLaVA JSON of one question and one answer an image, as published
    or as `jobs.export_captions` writes it."""
    seed: int
    """Draws the captions."""
    take: tuple[Share, ...] = ()
    """Captions of each source that come in. Empty: as many as go out, of the same images where
    there are captions of them, then of the same sources, then of any."""
    details: str | None = None
    """LLaVA's `detail_23k.json`: these go out. None: those that ask what such records ask."""
    expect_removed: int | None = None
    """How many detailed captions there must be; None accepts any number but 0."""
    allow_missing: bool = False
    """Write the mix although captions are missing; the report says how many of what."""
    coco_folder: str | None = None
    """Folder for COCO images that are named without one, as in LLaVA-Instruct-158K:
    `coco/train2017`. The mix names it."""
    file: str = "mix.json"
    """Name of the mix."""

    def __post_init__(self) -> None:
        for place in (self.sft, self.captions, self.details):
            if place is not None:
                check_place(place)
        sources = [one.source for one in self.take]
        if len(set(sources)) < len(sources):
            raise ConfigError(f"a source is named twice in {', '.join(sources)}; add its captions")
        folder = self.coco_folder
        if folder is not None and (not folder or folder.startswith("/") or ".." in folder):
            raise ConfigError(f"coco_folder {folder!r} must be a path below the data folder")
        if PurePosixPath(self.file).name != self.file or not self.file.endswith(".json"):
            raise ConfigError(f"file {self.file!r} must be a plain name that ends with .json")
        if self.file in (REPORT, "manifest.json", "config.json"):
            raise ConfigError(f"file {self.file!r} is taken; choose another name")


@dataclass(slots=True)
class _Seen:
    """What the first look at the instruction data found."""

    records: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    removed: list[Place] = field(default_factory=list)


def run(config: MixConfig, *, out: Ref, where: Where) -> Manifest:
    """Write the mix `out`; open it if it is finished.

    Raises:
        ConfigError: a file is not there.
        ContractError: a file is no LLaVA JSON, or has not the records that are asked for.
    """
    storage, show = where.storage, where.progress
    places = {"sft": config.sft, "captions": config.captions, "details": config.details}
    inputs = {
        name: digest_at(place, bar=f"checksum of {name}" if show else None)[:16]
        for name, place in places.items()
        if place is not None
    }
    if is_finished(storage, out, config=config, inputs=inputs):
        return find(storage, out)
    home = storage.sub(out.path)
    with hold(home) as lease, tempfile.TemporaryDirectory() as folder:
        if is_finished(storage, out, config=config, inputs=inputs):  # since the first check
            return find(storage, out)
        begin(storage, out, config, inputs=inputs, lease=lease)
        figures = _write(config, Path(folder), title=str(out), inputs=inputs, show=show)
        digests = home.upload(Path(folder), "")
        counts = {key: figures["all"][key] for key in ("after", "removed", "added")}
        counts = {"records": counts.pop("after"), **counts}
        return commit(
            storage, out, config=config, inputs=inputs, counts=counts, digests=digests, lease=lease
        )


def _write(
    config: MixConfig, folder: Path, *, title: str, inputs: dict[str, str], show: bool
) -> dict[str, Any]:
    """Write the mix and its reports into a folder; return the figures."""
    seen = _look(config, show)
    choice = _choose(config, seen.removed, show)
    seated, behind = seats(choice.captions, seen.removed)
    mixed = _mixed(config, seen, seated, behind, show)
    with (folder / config.file).open("wb") as file:
        write_records(file, mixed)
    pairs = mix_report.pairs(seen.removed, seated, behind)
    figures = mix_report.figures(
        seen.sources, seen.removed, choice, pairs, inputs=inputs, seed=config.seed
    )
    (folder / REPORT).write_text(json.dumps(figures, indent=1) + "\n")
    (folder / CARD).write_text(mix_report.card(title, config.file, figures))
    with (folder / REPLACED).open("w") as lines:
        lines.writelines(f"{json.dumps(one)}\n" for one in pairs)
    return figures


def _look(config: MixConfig, show: bool) -> _Seen:
    """Count the instruction data and find what goes out."""
    is_detail = details.in_file(config.details) if config.details else details.asks_for_detail
    seen = _Seen()
    for element in records_at(config.sft, bar="find detailed captions" if show else None):
        image = _image(element, config.sft, config)
        source = source_of(image)
        seen.records += 1
        seen.sources[source] += 1
        if is_detail(element.value):
            key = str(element.value["id"])
            seen.removed.append(Place(element.index, key, source, image or ""))
    found, expected = len(seen.removed), config.expect_removed
    if not found or expected not in (None, found):
        raise ContractError(
            f"{config.sft} has {found:,} detailed captions, expected are "
            f"{'some' if expected is None else f'{expected:,}'}; give LLaVA's detail_23k.json as "
            "--config.details, or the number that you accept as --config.expect-removed"
        )
    return seen


def _choose(config: MixConfig, removed: list[Place], show: bool) -> Choice:
    pool: list[Candidate] = []
    for element in records_at(config.captions, bar="choose captions" if show else None):
        turns = element.value["conversations"]
        image = _image(element, config.captions, config)
        if image is None or len(turns) != 2 or not turns[1]["value"].strip():
            raise ContractError(
                f"{config.captions}: {element} is no caption: one question, one answer that is not "
                "empty, and an image"
            )
        pool.append(candidate(element, image=image, seed=config.seed))
    choice = choose_shares(pool, config.take) if config.take else choose_equal(pool, removed)
    if choice.missing and not config.allow_missing:
        lacking = ", ".join(f"{count:,} of {source}" for source, count in choice.missing.items())
        raise ContractError(
            f"{config.captions} has too few captions: {lacking} are missing. Give a larger file, "
            "take fewer (--config.take), or accept that (--config.allow-missing)"
        )
    return choice


def _mixed(
    config: MixConfig,
    seen: _Seen,
    seated: dict[int, Candidate],
    behind: list[Candidate],
    show: bool,
) -> Iterator[dict[str, Any]]:
    """Yield the records of the mix: at the place of each that goes its successor, if it has one."""
    wanted = {one.index for one in (*seated.values(), *behind)}
    texts = {
        element.index: _with_folder(element, config.captions, config)
        for element in records_at(config.captions, bar="read captions" if show else None)
        if element.index in wanted
    }
    gone = {one.index for one in seen.removed}
    index = -1
    for element in records_at(config.sft, bar="write the mix" if show else None):
        index = element.index
        if index not in gone:
            yield _with_folder(element, config.sft, config)
        elif index in seated:
            yield texts[seated[index].index]
    if index + 1 != seen.records:
        raise ContractError(f"{config.sft} was changed while it was read; run again")
    for one in behind:
        yield texts[one.index]


def _image(element: Element, file: str, config: MixConfig) -> str | None:
    """Return a record's image as the mix names it."""
    image: str | None = element.value.get("image")
    if not is_bare(image):
        return image
    if config.coco_folder is None:
        raise ContractError(
            f"{file}: {element} names COCO's image {image} without a folder, so that other images "
            "of the mix would be looked for elsewhere; give --config.coco-folder coco/train2017"
        )
    return f"{config.coco_folder.rstrip('/')}/{image}"


def _with_folder(element: Element, file: str, config: MixConfig) -> dict[str, Any]:
    if not is_bare(element.value.get("image")):
        return element.value
    return {**element.value, "image": _image(element, file, config)}
