# SPDX-License-Identifier: Apache-2.0
"""Which captions are not trained on: those that fit badly, look alike, or leak a benchmark."""

from dataclasses import dataclass
from typing import Final

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.records import ScoreRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.dataset.near import MAX_DISTANCE, as_numbers, near_pairs

_MOST_SCORE: Final = 2.5


@identity_keys(
    "CaptionFilter",
    scores="scores",
    min_clip_score="min_clip_score",
    min_worst_clip_score="min_worst_clip_score",
    max_duplicate_bits="max_duplicate_bits",
    max_contamination_bits="max_contamination_bits",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionFilter:
    """Thresholds over finished scores; what is None removes nothing."""

    scores: Ref
    min_clip_score: float | None = None
    """Mean CLIPScore of the sentences, 0 to 2.5."""
    min_worst_clip_score: float | None = None
    """CLIPScore of the worst sentence, 0 to 2.5."""
    max_duplicate_bits: int | None = None
    """Of images whose hashes differ in at most so many bits, the first by id is kept. 0 to 7."""
    max_contamination_bits: int | None = None
    """Images this near to one of an evaluation set are left out. 0 to 7."""

    def __post_init__(self) -> None:
        for name, most in (
            ("min_clip_score", _MOST_SCORE),
            ("min_worst_clip_score", _MOST_SCORE),
            ("max_duplicate_bits", MAX_DISTANCE),
            ("max_contamination_bits", MAX_DISTANCE),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"{name} must be 0 to {most}, got {value}")


def left_out(storage: Storage, config: CaptionFilter, captions: Ref) -> dict[str, str]:
    """Return why each caption that is not trained on is left out, by its id.

    Raises:
        ArtifactMissing: the scores are not finished.
        ContractError: they are of other captions, or without the evaluation images they need.
    """
    scores = find(storage, config.scores)
    if scores.inputs.get(str(captions)) != find(storage, captions).fingerprint:
        raise ContractError(
            f"{config.scores} are scores of {', '.join(scores.inputs)} as they were then, not of "
            f"{captions} as it is now; score these captions (jobs.score_captions)"
        )
    rows = read_rows(storage, config.scores, ScoreRow)
    tests = [row for row in rows if not row.is_caption and row.phash]
    ours = [row for row in rows if row.is_caption]
    if config.max_contamination_bits is not None and not tests:
        raise ContractError(
            f"{config.scores} has no evaluation image to compare with; give "
            "--config.evaluation-images to jobs.score_captions, or max_contamination_bits None"
        )
    out = {row.id: reason for row in ours if (reason := _misfit(row, config))}
    hashed = [row for row in ours if row.phash and row.id not in out]
    if config.max_contamination_bits is not None:
        near = _near(tests, hashed, config.max_contamination_bits)
        out |= dict.fromkeys(near, "contaminated")
        hashed = [row for row in hashed if row.id not in out]
    if config.max_duplicate_bits is not None:
        out |= dict.fromkeys(_near([], hashed, config.max_duplicate_bits), "near_duplicate")
    return out


def _misfit(row: ScoreRow, config: CaptionFilter) -> str | None:
    """Name the threshold that a row alone misses."""
    if row.clip_score is None or row.worst_clip_score is None:
        return "no_score"
    if row.clip_score < (config.min_clip_score or 0):
        return "low_clip_score"
    if row.worst_clip_score < (config.min_worst_clip_score or 0):
        return "low_worst_clip_score"
    return None


def _near(first: list[ScoreRow], rows: list[ScoreRow], bits: int) -> list[str]:
    """Return the ids of the rows that are near one of `first`; if it is empty, each other."""
    hashes = as_numbers([row.phash or "" for row in (*first, *rows)])
    pairs = near_pairs(hashes, max_distance=bits, first=len(first) or None)
    return [rows[pair.item - len(first)].id for pair in pairs if pair.item >= len(first)]
