# SPDX-License-Identifier: Apache-2.0
"""The Batch API: whatever becomes of a batch, every answer is there once and at half the price."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from sg4v_ray.captions.batch_api import BatchApi
from sg4v_ray.captions.batches import BatchCounts, BatchLimits
from sg4v_ray.captions.ledger import Paid
from sg4v_ray.core.errors import ContractError, MoneySpent, TeacherUnusable
from tests.teacher.desk_site import KEY, ask, endpoint, opened
from tests.teacher_server.config import BatchPlan, ServerConfig
from tests.teacher_server.running import Running, serving

pytestmark = pytest.mark.teacher

LIMITS = BatchLimits(max_requests=25, max_bytes=10**6, poll_s=0.1)
ASKS = [ask(n) for n in range(100)]


async def in_batches(root: Path, provider: Running, writer: int = 1, **changes: Any) -> float:
    """Send all asks in batches and wait for them; return what was spent."""
    where = endpoint(provider.url, **changes)
    async with opened(root, where, writer=writer, limits=LIMITS) as site:
        for one in ASKS:
            await site.batches.add(one)
        await site.batches.finish()
        assert not site.ledger.open
        assert site.desk.purse.reserved_usd == pytest.approx(0.0, abs=1e-9)
        return site.desk.purse.spent_usd


async def online(root: Path, provider: Running, writer: int) -> list[Paid]:
    """Ask all online, as a job does once earlier batches have ended."""
    async with opened(root, endpoint(provider.url), writer=writer) as site:
        await site.batches.finish()
        answers = await site.ask_all(ASKS)
        assert all(isinstance(one, Paid) for one in answers)
        return answers  # type: ignore[return-value]


def test_expired_partial_and_shuffled_batches_leave_a_complete_result_at_half_price(
    tmp_path: Path,
) -> None:
    plans = (
        BatchPlan(expire=0.4),
        BatchPlan(partial=0.3, statuses=("500",)),
        BatchPlan(shuffle=True),
        None,
    )
    config = ServerConfig(batch_plans=plans, max_batch_requests=25, max_file_bytes=10**6)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        root = tmp_path / "ledger"
        spent = asyncio.run(in_batches(root, provider))
        lines = [one for one in provider.entries("batch_line") if one["billed"]]
        assert spent == pytest.approx(sum(one["usd"] for one in lines))
        tokens = sum(2.5 * one["prompt_tokens"] + 10 * one["completion_tokens"] for one in lines)
        assert spent == pytest.approx(tokens / 1e6 / 2)
        assert 70 < len(lines) < 85, "one batch expired, one failed in part"
        answers = asyncio.run(online(root, provider, 2))
        assert len(answers) == 100
        assert len(provider.entries("request")) == 100 - len(lines), "the rest, and only the rest"
        images = [one["image"] for one in (*lines, *provider.entries("request"))]
        assert len(images) == len(set(images)) == 100


def test_batches_keep_the_providers_limits(tmp_path: Path) -> None:
    config = ServerConfig(max_batch_requests=25, max_file_bytes=10**6)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        asyncio.run(in_batches(tmp_path / "ledger", provider))
        created = [one for one in provider.entries("batch") if one["status"] == "validating"]
        assert len(created) == 4
        assert not [one for one in provider.entries("batch") if one["status"] == "failed"]


def test_a_batch_whose_creation_was_not_answered_is_created_once(tmp_path: Path) -> None:
    plans = (BatchPlan(drop_create=True), None)
    with serving(ServerConfig(batch_plans=plans), tmp_path / "provider.jsonl") as provider:
        asyncio.run(in_batches(tmp_path / "ledger", provider))
        created = [one for one in provider.entries("batch") if one["status"] == "validating"]
        assert len(created) == 4
        assert len(provider.entries("batch_line")) == 100


def test_a_killed_job_takes_its_batches_up_again(tmp_path: Path) -> None:
    config = ServerConfig(batch_in_progress_s=1.5)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        root = tmp_path / "ledger"

        async def killed() -> None:
            async with opened(root, endpoint(provider.url), limits=LIMITS) as site:
                for one in ASKS[:60]:
                    await site.batches.add(one)

        asyncio.run(killed())
        created = len({one["batch"] for one in provider.entries("batch")})
        assert created == 2, "ten requests were not sent yet"
        asyncio.run(in_batches(root, provider, writer=2))
        assert len(provider.entries("batch_line")) == 100, "none twice"
        assert len({one["batch"] for one in provider.entries("batch")}) == 4


def test_a_batch_that_finds_the_providers_queue_full_is_tried_again(tmp_path: Path) -> None:
    config = ServerConfig(max_enqueued_requests=30, batch_in_progress_s=1.5)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        asyncio.run(in_batches(tmp_path / "ledger", provider))
        assert [one for one in provider.entries("batch") if one["status"] == "failed"]
        assert len(provider.entries("batch_line")) == 100


def test_a_refused_batch_says_what_to_change(tmp_path: Path) -> None:
    plans = (BatchPlan(fail="mismatched_model"),)
    with serving(ServerConfig(batch_plans=plans), tmp_path / "provider.jsonl") as provider:
        with pytest.raises(TeacherUnusable, match=r"mismatched_model.*--mode online"):
            asyncio.run(in_batches(tmp_path / "ledger", provider))
        (failed,) = [one for one in provider.entries("batch") if one["status"] == "failed"]
        lines = provider.entries("batch_line")
        assert not [one for one in lines if one["batch"] == failed["batch"]]


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (BatchPlan(odd_line=True), ContractError),
        (BatchPlan(partial=0.04, statuses=("401",)), TeacherUnusable),
    ],
)
def test_one_bad_line_of_a_batch_file_costs_no_other_answer(
    tmp_path: Path, plan: BatchPlan, error: type[Exception]
) -> None:
    with serving(ServerConfig(batch_plans=(plan,)), tmp_path / "provider.jsonl") as provider:
        root = tmp_path / "ledger"
        with pytest.raises(error):
            asyncio.run(in_batches(root, provider))
        asyncio.run(online(root, provider, 2))
        in_a_batch = len(provider.entries("batch_line"))
        assert len(provider.entries("request")) == 100 - in_a_batch + 1, "that of the bad line"


def test_an_earlier_runs_batch_is_waited_for_before_anything_is_asked_online(
    tmp_path: Path,
) -> None:
    config = ServerConfig(batch_in_progress_s=1.5)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        root = tmp_path / "ledger"

        async def killed() -> None:
            async with opened(root, endpoint(provider.url), limits=LIMITS) as site:
                for one in ASKS[:60]:
                    await site.batches.add(one)

        async def go_on() -> None:
            async with opened(root, endpoint(provider.url), writer=2) as site:
                assert site.batches.counts() == BatchCounts(requests=50, answered=0, batches=2)
                await site.batches.finish()
                assert site.batches.counts() == BatchCounts(requests=50, answered=50, batches=0)
                await site.ask_all(ASKS)

        asyncio.run(killed())
        asyncio.run(go_on())
        assert len(provider.entries("batch_line")) == len(provider.entries("request")) == 50


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


def test_what_a_killed_job_uploaded_and_never_used_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    async def dies(*_: object) -> str:
        raise Killed

    async def files(provider: Running) -> list[str]:
        async with AsyncOpenAI(base_url=provider.url, api_key=KEY) as client:
            return [one.id async for one in client.files.list()]

    with serving(ServerConfig(), tmp_path / "provider.jsonl") as provider:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(BatchApi, "create", dies)
            asyncio.run(in_batches(tmp_path / "ledger", provider))
        assert len(asyncio.run(files(provider))) == 1
        asyncio.run(in_batches(tmp_path / "ledger", provider, writer=2))
        assert asyncio.run(files(provider)) == []
        assert len(provider.entries("batch_line")) == 100


def test_the_cap_holds_for_batches_too(tmp_path: Path) -> None:
    with serving(ServerConfig(), tmp_path / "provider.jsonl") as provider:
        cap = 0.06  # all hundred cost about 0.12, and each reserves 0.004
        with pytest.raises(MoneySpent):
            asyncio.run(in_batches(tmp_path / "ledger", provider, max_usd=cap))
        assert 0.9 * cap < provider.billed_usd() <= cap
