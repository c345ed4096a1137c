# SPDX-License-Identifier: Apache-2.0
"""Draw the images that a teacher sees, by source and seed, and choose the prompt of each."""

import logging
from collections import Counter
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sg4v_ray.captions.prompts import aesthetic, prompt
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.config import fingerprint
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.row_files import RowIndex, open_index, write_index
from sg4v_ray.core.rows import all_rows
from sg4v_ray.core.sampling import draw, sample
from sg4v_ray.core.storage import Storage

_log = logging.getLogger(__name__)


@identity_keys("Share", source="source", prompt="prompt", count="count")
@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The images of one source, and what is asked of them."""

    source: str
    """Name of the source in the index."""
    prompt: str
    """Name of a prompt in `captions.prompts`."""
    count: int | None = None
    """Images that are drawn; None takes all."""

    def __post_init__(self) -> None:
        prompt(self.prompt)
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count of {self.source!r} must be at least 1, got {self.count}")


@identity_keys("SampleConfig", shares="shares", seed="seed", aesthetic_rate="aesthetic_rate")
@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which images are drawn. Part of identity."""

    shares: tuple[Share, ...]
    seed: int = 0
    """Draws the images, and those whose prompt asks for an aesthetic judgement too."""
    aesthetic_rate: float = 0.0
    """Share of images, 0 to 1, whose prompt is the aesthetic variant."""

    def __post_init__(self) -> None:
        names = Counter(one.source for one in self.shares)
        if not names or max(names.values()) > 1:
            raise ConfigError(
                f"shares must name each source once, and at least one; got {list(names.elements())}"
            )
        if not 0 <= self.aesthetic_rate <= 1:
            raise ConfigError(f"aesthetic_rate must be 0 to 1, got {self.aesthetic_rate}")
        if self.aesthetic_rate:
            for one in self.shares:
                aesthetic(prompt(one.prompt))


def choose(rows: pa.Table, config: SampleConfig) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
    """Draw the images of each share.

    Args:
        rows: an index, one row an image.

    Returns:
        Their rows with a `prompt` column, in the index's order; and for each source that has too
        few images how many were wanted and how many there are.

    Raises:
        ConfigError: a source has no image at all.
    """
    chosen: dict[str, str] = {}
    short: dict[str, tuple[int, int]] = {}
    for share in config.shares:
        ids = rows.filter(pc.equal(rows["source"], share.source))["id"].to_pylist()
        wanted = len(ids) if share.count is None else share.count
        if not ids:
            there = ", ".join(map(str, pc.unique(rows["source"]).to_pylist()))
            raise ConfigError(f"no image is of the source {share.source!r}; there are {there}")
        if len(ids) < wanted:
            short[share.source] = (wanted, len(ids))
        plain = prompt(share.prompt)
        for key in sample(ids, wanted, config.seed, "teacher-images"):
            judged = draw(key, config.seed, "aesthetic") < config.aesthetic_rate
            chosen[key] = aesthetic(plain).name if judged else plain.name
    rows = rows.filter(pc.is_in(rows["id"], value_set=pa.array(list(chosen), pa.string())))
    prompts = [chosen[one] for one in rows["id"].to_pylist()]
    return rows.append_column("prompt", pa.array(prompts, pa.string())), short


def sample_of(storage: Storage, config: SampleConfig, images: Ref) -> pa.Table:
    """Draw the images of each share from a finished index; see `choose`."""
    manifest = find(storage, images)
    rows, short = choose(all_rows(storage.sub(images.path), manifest, None), config)
    for source, (wanted, found) in short.items():
        _log.warning("%s: %d images wanted, %d there; all are taken", source, wanted, found)
    return rows


def write_chosen(
    storage: Storage, config: SampleConfig, images: Ref, artifact_dir: Storage
) -> RowIndex:
    """Write the drawn rows as an index of their own; a finished one is opened.

    Its folder is named by a hash of the sample and the index, so a run under another config writes
    to another folder before it is refused as drift.
    """
    key = fingerprint([asdict(config), find(storage, images).fingerprint])
    folder = artifact_dir.sub(f"chosen-{key}")
    return open_index(folder) or write_index(folder, [sample_of(storage, config, images)])
