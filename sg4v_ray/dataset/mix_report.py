# SPDX-License-Identifier: Apache-2.0
"""What a mix is made of, for people and programs: counts by source, and what replaced what."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sg4v_ray.dataset.choose import Candidate, Choice, Place

_COLUMNS = ("before", "removed", "added", "after")


def pairs(
    removed: Sequence[Place], seated: dict[int, Candidate], behind: Sequence[Candidate]
) -> list[dict[str, Any]]:
    """Return what stands where something went, in the order of the file; then what follows it.

    `place` counts the records of the instruction data; None is behind its end.
    """
    made = [_pair(one, seated.get(one.index)) for one in removed]
    return made + [_pair(None, one) for one in behind]


def _pair(out: Place | None, come: Candidate | None) -> dict[str, Any]:
    return {
        "place": out and out.index,
        "removed": out and out.id,
        "added": come and come.id,
        "removed_image": out and out.image,
        "added_image": come and come.image,
    }


def figures(
    before: Counter[str],
    removed: Sequence[Place],
    choice: Choice,
    replaced: Iterable[dict[str, Any]],
    *,
    inputs: dict[str, str],
    seed: int,
) -> dict[str, Any]:
    """Return the counts of a mix.

    Args:
        before: records of the instruction data by source.
        replaced: what `pairs` returns.
        inputs: the first 16 hex digits of the sha256 of each file.
    """
    out = Counter(one.source for one in removed)
    come = Counter(one.source for one in choice.captions)
    names = sorted({*before, *come})
    sources = {name: _row(before[name], out[name], come[name]) for name in names}
    both = [one for one in replaced if one["removed"] is not None and one["added"] is not None]
    return {
        "all": _row(before.total(), out.total(), come.total()),
        "sources": sources,
        "replaced": len(both),
        "replaced_about_the_same_image": sum(
            one["removed_image"] == one["added_image"] for one in both
        ),
        "missing": choice.missing,
        "seed": seed,
        "inputs": inputs,
    }


def _row(before: int, removed: int, added: int) -> dict[str, int]:
    return {"before": before, "removed": removed, "added": added, "after": before - removed + added}


def table(figures: dict[str, Any]) -> str:
    """Return the counts by source as a Markdown table."""
    rows = [*figures["sources"].items(), ("all", figures["all"])]
    lines = [f"| source | {' | '.join(_COLUMNS)} |", "|---|---|---|---|---|"]
    for name, row in rows:
        cells = (f"{row[column]:,}" for column in _COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def card(title: str, file: str, figures: dict[str, Any]) -> str:
    """Return the page of a mix: Markdown."""
    lines = [
        f"# {title}",
        "",
        f"`{file}`: {figures['all']['after']:,} records in LLaVA's schema. Detailed captions of "
        "the instruction data are replaced by a teacher's. The images and both files that it is "
        "made from keep their licences.",
        "",
        table(figures),
        "",
        f"{figures['replaced']:,} captions stand at the place of a removed record, "
        f"{figures['replaced_about_the_same_image']:,} of them about its image; `replaced.jsonl` "
        f"names each pair. Seed {figures['seed']}.",
    ]
    if figures["missing"]:
        lacking = ", ".join(f"{count:,} of {name}" for name, count in figures["missing"].items())
        lines += ["", f"Captions that were wanted and are missing: {lacking}."]
    lines += ["", "| made from | sha256 |", "|---|---|"]
    lines += [f"| {name} | {digest} |" for name, digest in figures["inputs"].items()]
    return "\n".join(lines) + "\n"
