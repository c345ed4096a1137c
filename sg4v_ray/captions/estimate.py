# SPDX-License-Identifier: Apache-2.0
"""What a collection will take before a request is sent: images, tokens, dollars, hours by source.

Images that an earlier run has an answer for are counted apart: they cost nothing more. Image
tokens are those of a sample of each source, decoded and sized as they will be sent.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from sg4v_ray.captions.choose import choose
from sg4v_ray.captions.collect import CollectConfig
from sg4v_ray.captions.ledger import Ledger
from sg4v_ray.captions.prompts import prompt
from sg4v_ray.captions.session import LEDGER
from sg4v_ray.captions.teacher import Endpoint, TeacherConfig, asked_keys
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.images import Rejected, open_image
from sg4v_ray.core.rows import all_rows
from sg4v_ray.core.sampling import sample
from sg4v_ray.core.text_table import text_table
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.pixels import read_images

_LOOKED_AT: Final = 20
"""Images of each source that are opened."""
_CHARS: Final = 942
"""Mean length of a caption of GPT-4V in the paper, section 3.2."""
_CHARS_A_TOKEN: Final = 4.4
"""English prose with GPT-4's tokenizer: OpenAI's rule of thumb is 4; captions have long words."""
_BYTES_A_TOKEN: Final = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceEstimate:
    """One source, or all together."""

    source: str
    images: int
    wanted: int
    """More than `images` where the source has too few."""
    answered: int
    """Images of these that an earlier run has paid for: answered, or in a batch under way."""
    prompt_tokens: int
    completion_tokens: int
    """Expected, of captions as long as the paper's."""
    usd: float
    """Expected, online."""
    usd_in_batches: float
    most_usd: float
    """If every answer were as long as it may be: what a cap must allow to be never reached."""
    hours: float | None
    """At the limits given; None without limits."""


def estimate(
    config: CollectConfig, endpoint: Endpoint, *, images: Ref, where: Where
) -> list[SourceEstimate]:
    """Return what each source takes, and last the sum.

    Raises:
        ArtifactCorrupt: the ledger of earlier runs is damaged.
        ArtifactMissing: the index is not finished.
        ConfigError: a source has no image.
    """
    storage = where.storage
    index = all_rows(storage.sub(images.path), find(storage, images), None)
    rows, short = choose(index, config.sample)
    ledger = Ledger(storage.sub(LEDGER), writer=None)
    paid = {(one.row, one.asked) for one in ledger.answers.values()}
    paid |= {(one.row, one.asked) for one in ledger.open.values() if one.batch is not None}
    parts = []
    for share in config.sample.shares:
        mine = rows.filter(pc.equal(rows["source"], share.source))
        wanted = short.get(share.source, (len(mine), 0))[0]
        new = mine.filter(pa.array(_is_new(mine, config.teacher, paid), pa.bool_()))
        part = _of_source(share.source, new, config, endpoint)
        parts.append(replace(part, images=len(mine), wanted=wanted, answered=len(mine) - len(new)))
    return [*parts, _sum(parts)]


def _is_new(rows: pa.Table, config: TeacherConfig, paid: set[tuple[str, str]]) -> list[bool]:
    """Say of each row whether nobody has asked the same question about it."""
    asked = {
        name: asked_keys(config, prompt(name).sha256)
        for name in pc.unique(rows["prompt"]).to_pylist()
    }
    pairs = zip(rows["id"].to_pylist(), rows["prompt"].to_pylist(), strict=True)
    return [all((key, one) not in paid for one in asked[name]) for key, name in pairs]


def _of_source(
    source: str, rows: pa.Table, config: CollectConfig, endpoint: Endpoint
) -> SourceEstimate:
    count, prices = len(rows), endpoint.prices
    text = sum(
        number["counts"] * len(prompt(number["values"]).text) / _BYTES_A_TOKEN
        for number in pc.value_counts(rows["prompt"]).to_pylist()
    )
    prompt_tokens = round(text + count * _image_tokens(rows, config, endpoint))
    said = min(config.teacher.max_tokens, round(_CHARS / _CHARS_A_TOKEN))
    return SourceEstimate(
        source=source,
        images=count,
        wanted=count,
        answered=0,
        prompt_tokens=prompt_tokens,
        completion_tokens=count * said,
        usd=prices.usd(prompt_tokens, count * said),
        usd_in_batches=prices.usd(prompt_tokens, count * said, in_batch=True),
        most_usd=prices.usd(prompt_tokens, count * config.teacher.max_tokens),
        hours=_hours(count, prompt_tokens + count * said, endpoint),
    )


def _image_tokens(rows: pa.Table, config: CollectConfig, endpoint: Endpoint) -> float:
    """Return the mean tokens of an image; the most possible where none of the sample opens."""
    sent, price = config.teacher.image, endpoint.prices.image
    looked_at = sample(rows["id"].to_pylist(), _LOOKED_AT, config.sample.seed, "estimate")
    uris = rows.filter(pc.is_in(rows["id"], value_set=pa.array(looked_at, pa.string())))[
        "uri"
    ].to_pylist()
    tokens = []
    for data in read_images(uris, limits=config.images, fetch=config.fetch):
        image = data if isinstance(data, Rejected) else open_image(data, config.images)
        if isinstance(image, Image.Image):
            image.thumbnail((sent.max_side, sent.max_side))
            tokens.append(price.of(image.width, image.height, sent.detail))
    if not tokens:
        return price.of(sent.max_side, sent.max_side, sent.detail)
    return sum(tokens) / len(tokens)


def _hours(requests: int, tokens: int, endpoint: Endpoint) -> float | None:
    limits = endpoint.limits
    minutes = [
        amount / limit
        for amount, limit in (
            (requests, limits.requests_per_min),
            (tokens, limits.tokens_per_min),
        )
        if limit is not None
    ]
    return max(minutes) / 60 if minutes else None


def _sum(parts: list[SourceEstimate]) -> SourceEstimate:
    hours = [one.hours for one in parts if one.hours is not None]
    return SourceEstimate(
        source="all",
        images=sum(one.images for one in parts),
        wanted=sum(one.wanted for one in parts),
        answered=sum(one.answered for one in parts),
        prompt_tokens=sum(one.prompt_tokens for one in parts),
        completion_tokens=sum(one.completion_tokens for one in parts),
        usd=math.fsum(one.usd for one in parts),
        usd_in_batches=math.fsum(one.usd_in_batches for one in parts),
        most_usd=math.fsum(one.most_usd for one in parts),
        hours=sum(hours) if hours else None,
    )


def table(parts: list[SourceEstimate]) -> str:
    """Return the estimate as text in columns."""
    head = ("source", "images", "answered", "prompt tokens", "answer tokens", "USD", "in batches")
    lines = [(*head, "at most", "hours")]
    for one in parts:
        images = f"{one.images:,}"
        if one.images < one.wanted:
            images += f" of {one.wanted:,}"
        lines.append(
            (
                one.source,
                images,
                f"{one.answered:,}",
                f"{one.prompt_tokens:,}",
                f"{one.completion_tokens:,}",
                f"{one.usd:,.2f}",
                f"{one.usd_in_batches:,.2f}",
                f"{one.most_usd:,.2f}",
                "no limits given" if one.hours is None else f"{one.hours:,.1f}",
            )
        )
    return text_table(lines)
