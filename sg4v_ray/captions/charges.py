# SPDX-License-Identifier: Apache-2.0
"""What one request may cost before it goes out, and what is charged for what came back."""

import logging
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from PIL import Image

from sg4v_ray.captions.ledger import Sent
from sg4v_ray.captions.prompts import Prompt
from sg4v_ray.captions.teacher import Reply, TeacherConfig, asked_key
from sg4v_ray.core.price import PriceTable, most_tokens

_log = logging.getLogger(__name__)

_SOUND_SHARE: Final = 0.5
"""Prompt tokens below this share of what the price table makes of a request are not believed."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One image and what it is asked."""

    row: str
    image: bytes
    """Encoded as it is sent."""
    image_sha256: str
    """Of the bytes that the image was made from."""
    prompt: Prompt
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that one request can take, and what its prompt is expected to be charged as."""

    prompt_tokens: int
    completion_tokens: int
    expected_prompt_tokens: int

    @property
    def least_prompt_tokens(self) -> float:
        """Prompt tokens below which a usage is not believed."""
        return _SOUND_SHARE * self.expected_prompt_tokens

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


class Charges:
    """The price table of a desk, and what experience says of it."""

    def __init__(self, prices: PriceTable, config: TeacherConfig) -> None:
        self._prices, self._config = prices, config
        self._dearer = 1.0
        """How much more than the price table allows a request has cost."""
        self._warned: set[str] = set()

    def bounds(self, ask: Ask) -> Bounds:
        """Return the most that an ask can take."""
        config = self._config
        width, height = Image.open(BytesIO(ask.image)).size  # our own encoding: reads the header
        prices, detail = self._prices.image, config.image.detail
        most = prices.most_of(width, height, detail) + most_tokens(ask.prompt.text)
        expected = prices.of(width, height, detail) + len(ask.prompt.text.split())
        return Bounds(most, config.max_tokens, expected)

    def sent(
        self, ticket: str, key: str, job: str, ask: Ask, most: Bounds, *, in_batch: bool = False
    ) -> Sent:
        """Return the note of a request: what it can cost by the price table and what was charged.

        In a batch it has no batch yet.
        """
        usd = self._prices.usd(most.prompt_tokens, most.completion_tokens, in_batch=in_batch)
        return Sent(
            ticket,
            key,
            ask.row,
            job,
            usd * self._dearer,
            asked=asked_key(self._config, ask.prompt.sha256),
            table_usd=usd,
            least_prompt_tokens=most.least_prompt_tokens,
        )

    def cost(self, reply: Reply, sent: Sent, *, in_batch: bool = False) -> float:
        """Return what is charged for a reply: by its usage, or the most where that cannot be."""
        told = self._prices.usd(reply.prompt_tokens, reply.completion_tokens, in_batch=in_batch)
        usd = sent.usd
        if not reply.usage_is_sound or reply.prompt_tokens < sent.least_prompt_tokens:
            if usd:  # else nothing is charged
                self._warn_once(
                    "usage",
                    f"a usage of {reply.prompt_tokens} and {reply.completion_tokens} tokens is not "
                    "believed and charged in full; if the provider counts images otherwise, give "
                    "--endpoint.prices.image.base and .per-tile",
                )
            return max(usd, told)
        if told > usd:
            # By the table, not by what was reserved: many were reserved before the first was told.
            self._dearer = max(self._dearer, told / sent.table_usd) if sent.table_usd else 1.0
            self._warn_once(
                "price",
                f"a request cost ${told:.5f} where the price table allows ${usd:.5f}; correct "
                "--endpoint.prices.input-usd-per-mtok, .output-usd-per-mtok and .image. From here "
                "on so much more is reserved",
            )
        return told

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            _log.warning("%s", text)
