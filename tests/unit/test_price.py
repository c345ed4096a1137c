# SPDX-License-Identifier: Apache-2.0
"""What a request costs: exactly afterwards, and before it goes out never less than that."""

import pytest

from sg4v_ray.captions.prompts import PROMPTS
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.price import ImageTokens, PriceTable, Purse, most_tokens

pytestmark = pytest.mark.teacher


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        # The examples of OpenAI's guide: 1,024 x 1,024 and 2,048 x 4,096 with detail high.
        (1024, 1024, 765),
        (2048, 4096, 1105),
        (512, 512, 255),
        (300, 200, 255),
    ],
)
def test_an_image_is_charged_by_tiles(width: int, height: int, tokens: int) -> None:
    assert ImageTokens().of(width, height, "high") == tokens
    assert ImageTokens().of(width, height, "low") == 85
    assert ImageTokens().most_of(width, height, "high") >= tokens


@pytest.mark.parametrize("width", [1, 20, 100, 300])
def test_a_thin_image_is_not_reserved_a_fortune_for(width: int) -> None:
    assert ImageTokens().most_of(2048, width, "high") <= 85 + 170 * 8


def test_a_thousand_captions_of_gpt_4o() -> None:
    prices = PriceTable(input_usd_per_mtok=2.5, output_usd_per_mtok=10.0)
    assert prices.usd(1000 * 900, 1000 * 215) == pytest.approx(2.25 + 2.15)
    assert prices.usd(1000 * 900, 1000 * 215, in_batch=True) == pytest.approx(2.2)


def test_prompts_have_fewer_tokens_than_are_reserved_for_them() -> None:
    for one in PROMPTS.values():
        # A token of English is rarely shorter than a word or a punctuation mark.
        pieces = len(one.text.split()) + sum(one.text.count(mark) for mark in ",.;:-")
        assert pieces * 1.3 < most_tokens(one.text)


def test_what_is_spent_and_promised_never_passes_the_cap() -> None:
    purse = Purse(cap_usd=1.0, spent_usd=0.5)
    assert purse.may(0.5)
    purse.reserve(0.3)
    assert not purse.may(0.3)
    purse.settle(0.3, 0.1)
    assert purse.may(0.4)
    assert not purse.may(0.41)
    assert Purse(cap_usd=None).may(10**9)


@pytest.mark.parametrize("name", ["input_usd_per_mtok", "output_usd_per_mtok", "batch_factor"])
def test_a_negative_price_is_refused_by_name(name: str) -> None:
    prices = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 1.0, name: -1.0}
    with pytest.raises(ConfigError, match=name):
        PriceTable(**prices)
