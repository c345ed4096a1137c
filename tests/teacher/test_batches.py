# SPDX-License-Identifier: Apache-2.0
"""The Batch API: whatever becomes of a batch, every answer is there once and at half the price."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from sg4v_ray.captions.batch_api import BatchApi
from sg4v_ray.captions.batches import BatchCounts, BatchLimits
from sg4v_ray.captions.ledger import Ledger
from sg4v_ray.core.errors import ConfigError, ContractError, TeacherUnusable
from sg4v_ray.core.storage import Storage
from tests.teacher.batch_site import ASKS, LIMITS, in_batches, online
from tests.teacher.desk_site import JOB, KEY, endpoint, opened
from tests.teacher_server.config import BatchPlan, ServerConfig
from tests.teacher_server.running import Running, serving

pytestmark = pytest.mark.teacher


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


@pytest.mark.parametrize(
    ("limits", "num_batches"),
    [
        (LIMITS, 4),
        # A request has about 1,900 bytes: 13 of them to a file.
        (replace(LIMITS, max_bytes=26_000), 8),
        (replace(LIMITS, max_open=1), 4),
    ],
)
def test_batches_keep_the_providers_limits(
    tmp_path: Path, limits: BatchLimits, num_batches: int
) -> None:
    config = ServerConfig(
        max_batch_requests=limits.max_requests,
        max_file_bytes=limits.max_bytes + 1000,  # around the file
        max_enqueued_requests=limits.max_open * limits.max_requests,
    )
    with serving(config, tmp_path / "provider.jsonl") as provider:
        asyncio.run(in_batches(tmp_path / "ledger", provider, limits=limits))
        created = [one for one in provider.entries("batch") if one["status"] == "validating"]
        assert len(created) == num_batches
        assert not [one for one in provider.entries("batch") if one["status"] == "failed"]
        assert len(provider.entries("batch_line")) == 100


def test_a_request_too_large_for_any_batch_is_asked_online(tmp_path: Path) -> None:
    with serving(ServerConfig(), tmp_path / "provider.jsonl") as provider:
        small = replace(LIMITS, max_bytes=1000)
        asyncio.run(in_batches(tmp_path / "ledger", provider, limits=small))
        assert not provider.entries("batch")
        asyncio.run(online(tmp_path / "ledger", provider, 2))
        assert len(provider.entries("request")) == 100


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


def test_a_batch_that_never_finds_room_says_what_to_change(tmp_path: Path) -> None:
    config = ServerConfig(max_enqueued_requests=10)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        with pytest.raises(TeacherUnusable, match=r"no room .* smaller --batch\.max-requests"):
            asyncio.run(in_batches(tmp_path / "ledger", provider))
        assert provider.entries("batch_line") == []
        small = replace(LIMITS, max_requests=10, max_open=1)
        asyncio.run(in_batches(tmp_path / "ledger", provider, 2, limits=small))
        assert len(provider.entries("batch_line")) == 100


def test_a_batch_that_was_created_anew_at_a_kill_is_not_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    config = ServerConfig(max_enqueued_requests=30, batch_in_progress_s=1.0)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        create, created = BatchApi.create, Counter[str]()

        async def dies_the_second_time(self: BatchApi, name: str, *args: Any, **more: Any) -> str:
            made = await create(self, name, *args, **more)
            created[name] += 1
            if created[name] > 1:
                raise Killed  # before it is noted
            return made

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(BatchApi, "create", dies_the_second_time)
            asyncio.run(in_batches(tmp_path / "ledger", provider))
        asyncio.run(in_batches(tmp_path / "ledger", provider, 2))
        assert len(provider.entries("batch_line")) == 100, "none twice"


def test_a_provider_without_a_batch_api_can_still_be_asked_online(tmp_path: Path) -> None:
    with serving(ServerConfig(has_batch_api=False), tmp_path / "provider.jsonl") as provider:
        with pytest.raises(TeacherUnusable, match="--mode online does without"):
            asyncio.run(in_batches(tmp_path / "ledger", provider))
        answers = asyncio.run(online(tmp_path / "ledger", provider, 2))
        assert len(answers) == len(provider.entries("request")) == 100


async def begun(root: Path, provider: Running, job: str = JOB) -> None:
    """Send two batches and end, as a killed job does."""
    async with opened(root, endpoint(provider.url), limits=LIMITS, job=job) as site:
        for one in ASKS[:51]:
            await site.batches.add(one)


def test_a_batch_elsewhere_is_given_up_only_when_that_is_wanted(tmp_path: Path) -> None:
    root = tmp_path / "ledger"
    with serving(ServerConfig(), tmp_path / "provider.jsonl") as provider:
        asyncio.run(begun(root, provider))
        elsewhere = provider.url.replace("127.0.0.1", "localhost")

        async def there(limits: BatchLimits, writer: int) -> None:
            async with opened(root, endpoint(elsewhere), writer=writer, limits=limits):
                pass

        with pytest.raises(
            ConfigError, match=rf"25 requests .* give --endpoint\.base-url {provider.url}"
        ):
            asyncio.run(there(LIMITS, 2))
        with_slash = endpoint(provider.url + "/")

        async def here() -> None:
            async with opened(root, with_slash, writer=3, limits=LIMITS) as site:
                await site.batches.finish()

        asyncio.run(here())
        assert len(Ledger(Storage(str(root)), writer=None).answers) == 50


def test_a_batch_that_is_given_up_is_charged_in_full(tmp_path: Path) -> None:
    root = tmp_path / "ledger"
    with (
        serving(ServerConfig(), tmp_path / "a.jsonl") as provider,
        serving(ServerConfig(), tmp_path / "b.jsonl") as other,
    ):
        asyncio.run(begun(root, provider))
        asyncio.run(in_batches(root, other, 2, limits=replace(LIMITS, give_up=True)))
        notes = Ledger(Storage(str(root)), writer=None)
        assert (len(notes.lost), len(notes.answers)) == (50, 100)
        assert notes.spent_usd[JOB] > provider.billed_usd() + other.billed_usd()


def test_answers_that_the_provider_has_no_more_are_charged_and_asked_again(tmp_path: Path) -> None:
    root = tmp_path / "ledger"
    with serving(ServerConfig(), tmp_path / "provider.jsonl") as provider:
        asyncio.run(begun(root, provider))

        async def delete_results() -> None:
            async with AsyncOpenAI(base_url=provider.url, api_key=KEY) as client:
                while len(found := [one async for one in client.files.list()]) < 4:
                    await asyncio.sleep(0.05)
                for one in found:
                    await client.files.delete(one.id)

        asyncio.run(delete_results())
        asyncio.run(in_batches(root, provider, 2))
        notes = Ledger(Storage(str(root)), writer=None)
        assert len(notes.lost) == 50
        assert len(asyncio.run(online(root, provider, 3))) == 100


def test_what_a_batch_of_another_collection_asks_is_not_asked_twice(tmp_path: Path) -> None:
    root = tmp_path / "ledger"
    with serving(ServerConfig(), tmp_path / "provider.jsonl") as provider:
        asyncio.run(begun(root, provider, job="others@v1"))
        with pytest.raises(ConfigError, match="in a batch of others@v1"):
            asyncio.run(in_batches(root, provider, 2))
        assert provider.entries("request") == []


def test_counts_that_say_nothing_do_no_harm(tmp_path: Path) -> None:
    plans = (BatchPlan(odd_counts=True),) * 4
    with serving(ServerConfig(batch_plans=plans), tmp_path / "provider.jsonl") as provider:
        asyncio.run(in_batches(tmp_path / "ledger", provider))
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
        notes = Ledger(Storage(str(root)), writer=None)
        assert notes.spent_usd[JOB] >= provider.billed_usd()
        assert len(notes.lost) == (error is ContractError), "what was billed and cannot be read"


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
                assert site.batches.counts() == BatchCounts(
                    requests=50, answered=0, new=0, batches=2
                )
                await site.batches.finish()
                assert site.batches.counts() == BatchCounts(
                    requests=50, answered=50, new=50, batches=0
                )
                await site.ask_all(ASKS)

        asyncio.run(killed())
        asyncio.run(go_on())
        assert len(provider.entries("batch_line")) == len(provider.entries("request")) == 50


def test_what_a_killed_job_uploaded_and_never_used_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    async def dies(*_: object, **__: object) -> str:
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
