# SPDX-License-Identifier: Apache-2.0
"""What a request to a paid model costs, at most before it is sent and exactly afterwards."""

import math
from dataclasses import dataclass
from typing import Final, Literal

from sg4v_ray.core.errors import ConfigError

Detail = Literal["low", "high"]

_FIT: Final = 2048
_SHORT_SIDE: Final = 768
_TILE: Final = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """How many prompt tokens an image is charged as: a base, and so many a tile of 512 pixels.

    Source:
        OpenAI's guide "Images and vision", section on costs: with detail `high` an image is scaled
        to fit 2,048 x 2,048, then until its shortest side has 768 pixels, and cut into tiles;
        `low` costs the base. GPT-4o and GPT-4 Turbo: 85 and 170. Whether a small image is scaled
        up the guide does not say: `of` says no, `most_of` yes.
    """

    base: int = 85
    per_tile: int = 170

    def of(self, width: int, height: int, detail: Detail) -> int:
        """Return the tokens of an image of that many pixels."""
        fit = min(1.0, _FIT / max(width, height))
        return self._tiled(width, height, detail, fit * min(1.0, _short(width, height, fit)))

    def most_of(self, width: int, height: int, detail: Detail) -> int:
        """Return the most tokens that an image may be charged as: see the source above."""
        fit = min(1.0, _FIT / max(width, height))
        most = _FIT / max(width, height)  # a thin image is not scaled up past what fits
        return self._tiled(width, height, detail, min(most, fit * _short(width, height, fit)))

    def _tiled(self, width: int, height: int, detail: Detail, scale: float) -> int:
        if detail == "low":
            return self.base
        tiles = math.prod(math.ceil(round(scale * side, 6) / _TILE) for side in (width, height))
        return self.base + self.per_tile * tiles


def _short(width: int, height: int, fit: float) -> float:
    """Return the factor that gives the shortest side 768 pixels."""
    return _SHORT_SIDE / (fit * min(width, height))


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceTable:
    """Prices of one model. Look them up before a run: they change, and nothing here can tell."""

    input_usd_per_mtok: float
    """Dollars for a million prompt tokens, images included."""
    output_usd_per_mtok: float
    """Dollars for a million generated tokens."""
    batch_factor: float = 0.5
    """What a request costs in a batch, as a share of these prices."""
    image: ImageTokens = ImageTokens()

    def __post_init__(self) -> None:
        for name in ("input_usd_per_mtok", "output_usd_per_mtok", "batch_factor"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} must be 0 or more, got {value}")

    def usd(self, prompt_tokens: int, completion_tokens: int, *, in_batch: bool = False) -> float:
        """Return what so many tokens cost."""
        full = (
            prompt_tokens * self.input_usd_per_mtok + completion_tokens * self.output_usd_per_mtok
        ) / 1e6
        return full * self.batch_factor if in_batch else full


def most_tokens(text: str) -> int:
    """Return more tokens than any tokenizer of today makes of an English text.

    Two bytes a token and some for the chat format: English has about four. What is reserved must
    not be less than what is charged.
    """
    return len(text.encode()) // 2 + 64


@dataclass(slots=True)
class Purse:
    """Money of one job: what is spent, what is promised, and the cap that both never pass."""

    cap_usd: float | None
    spent_usd: float = 0.0
    reserved_usd: float = 0.0

    def may(self, usd: float) -> bool:
        """Say whether so much more can be promised."""
        return self.cap_usd is None or self.spent_usd + self.reserved_usd + usd <= self.cap_usd

    def reserve(self, usd: float) -> None:
        """Promise money for a request that is about to go out."""
        self.reserved_usd += usd

    def settle(self, reserved_usd: float, usd: float) -> None:
        """Replace a promise by what was charged; 0 for a request that was not taken."""
        self.reserved_usd = max(0.0, self.reserved_usd - reserved_usd)
        self.spent_usd += usd
