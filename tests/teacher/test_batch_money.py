# SPDX-License-Identifier: Apache-2.0
"""Money in batches: the cap holds, whatever a usage or a price table says that is wrong."""

import asyncio
import hashlib
from pathlib import Path

import pytest

from sg4v_ray.captions.charges import Ask
from sg4v_ray.captions.prompts import OBJECTS_2026_11
from sg4v_ray.core.errors import MoneySpent, TeacherUnusable
from sg4v_ray.core.price import ImageTokens, PriceTable
from tests.teacher.batch_site import LIMITS, in_batches
from tests.teacher.desk_site import JOB, endpoint, opened, picture
from tests.teacher_server.config import BatchPlan, ServerConfig
from tests.teacher_server.running import serving

pytestmark = pytest.mark.teacher

TOO_CHEAP = PriceTable(
    input_usd_per_mtok=100.0,
    output_usd_per_mtok=0.1,
    image=ImageTokens(base=5, per_tile=5),  # the provider counts 85 and 170
)


def large_ask(number: int) -> Ask:
    """Return an ask about an image of four tiles."""
    image = picture(number, size=(600, 600))
    return Ask(f"{number}", image, hashlib.sha256(image).hexdigest(), OBJECTS_2026_11)


def test_a_wrong_price_table_is_corrected_before_a_batch_is_reserved(tmp_path: Path) -> None:
    config = ServerConfig(usd_per_million_input=100.0, usd_per_million_output=0.1)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        cap = 1.0
        where = endpoint(provider.url, prices=TOO_CHEAP, max_usd=cap)

        async def collect() -> None:
            async with opened(tmp_path / "ledger", where, limits=LIMITS) as site:
                for number in range(60):
                    await site.batches.add(large_ask(number))

        with pytest.raises(MoneySpent, match=r"one more request may cost \$0\.0"):
            asyncio.run(collect())
        assert 0.8 * cap < provider.billed_usd() <= cap


def test_a_price_table_that_is_wrong_many_times_is_corrected_once(tmp_path: Path) -> None:
    config = ServerConfig(usd_per_million_input=100.0, usd_per_million_output=0.1)
    with serving(config, tmp_path / "provider.jsonl") as provider:

        async def collect() -> float:
            where = endpoint(provider.url, prices=TOO_CHEAP)
            async with opened(tmp_path / "ledger", where) as site:
                await site.ask_all([large_ask(number) for number in range(30)])
                one, charges = large_ask(31), site.desk.charges
                return charges.sent("t", "k", JOB, one, charges.bounds(one)).usd

        reserved = asyncio.run(collect())
        dearest = max(one["usd"] for one in provider.entries("request"))
        assert dearest <= reserved < 1.1 * dearest


def test_a_usage_that_is_too_small_is_charged_in_full(tmp_path: Path) -> None:
    config = ServerConfig(faults={"usage_small": 1.0})
    with serving(config, tmp_path / "provider.jsonl") as provider:
        spent = asyncio.run(in_batches(tmp_path / "ledger", provider))
        assert spent >= provider.billed_usd() > 0


def test_an_empty_account_ends_a_job_at_once(tmp_path: Path) -> None:
    plans = (BatchPlan(no_money=True),)
    with (
        serving(ServerConfig(batch_plans=plans), tmp_path / "provider.jsonl") as provider,
        pytest.raises(TeacherUnusable, match="exceeded your current quota"),
    ):
        asyncio.run(in_batches(tmp_path / "ledger", provider))


def test_the_cap_holds_for_batches_too(tmp_path: Path) -> None:
    with serving(ServerConfig(), tmp_path / "provider.jsonl") as provider:
        cap = 0.06  # all hundred cost about 0.12, and each reserves 0.004
        with pytest.raises(MoneySpent):
            asyncio.run(in_batches(tmp_path / "ledger", provider, max_usd=cap))
        assert 0.9 * cap < provider.billed_usd() <= cap
