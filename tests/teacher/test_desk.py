# SPDX-License-Identifier: Apache-2.0
"""The desk's promises, kept in front of a provider that does everything wrong: never twice, never
over the cap, nothing lost without a note.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sg4v_ray.captions.ledger import Paid
from sg4v_ray.captions.prompts import BASE_2026_11
from sg4v_ray.core.errors import LeaseLost, MoneySpent, TeacherBusy, TeacherUnusable
from sg4v_ray.core.rate import Limits
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.storage import Storage
from tests.teacher.desk_site import JOB, ask, endpoint, opened
from tests.teacher_server.asking import sha
from tests.teacher_server.config import Always, ServerConfig
from tests.teacher_server.running import Running, serving

pytestmark = pytest.mark.teacher

EVERY_ANSWER = {
    **dict.fromkeys(("refusal", "refusal_prose", "content_filter", "length"), 0.04),
    **dict.fromkeys(("usage_missing", "usage_zero", "usage_negative"), 0.04),
    **dict.fromkeys(("usage_small", "usage_total"), 0.04),
}
"""Faults after which the answer has come."""
EVERY_FAULT = {
    **EVERY_ANSWER,
    **dict.fromkeys(("429_ms", "500", "drop_before", "drop_after", "malformed"), 0.03),
}


@pytest.fixture
def provider(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    config = getattr(request, "param", ServerConfig())
    with serving(config, tmp_path / "provider.jsonl") as running:
        yield running


def billed(provider: Running) -> list[dict[str, Any]]:
    """Return the requests that the provider wants money for."""
    return [one for one in provider.entries("request") if one["billed"]]


def test_what_is_answered_is_never_asked_again(tmp_path: Path, provider: Running) -> None:
    async def run(writer: int) -> list[Any]:
        async with opened(tmp_path / "ledger", endpoint(provider.url), writer=writer) as site:
            return await site.ask_all([ask(n % 20) for n in range(60)])

    first, second = asyncio.run(run(1)), asyncio.run(run(2))
    assert first == second
    assert len(provider.entries("request")) == 20, "neither by the same run nor by the next"


@pytest.mark.parametrize("provider", [ServerConfig(faults=EVERY_FAULT)], indirect=True)
def test_of_one_image_every_payment_but_one_is_reported(tmp_path: Path, provider: Running) -> None:
    async def run() -> tuple[list[Any], set[str], float]:
        async with opened(tmp_path / "ledger", endpoint(provider.url)) as site:
            answers = await site.ask_all([ask(n) for n in range(200)])
            lost = {one.ticket for one in site.ledger.lost}
            return answers, lost, site.desk.purse.spent_usd

    answers, lost, spent_usd = asyncio.run(run())
    assert all(isinstance(one, Paid) for one in answers)
    kept = Counter(one["image"] for one in billed(provider) if one["client_request_id"] not in lost)
    assert len(kept) == 200
    assert set(kept.values()) == {1}
    assert spent_usd >= provider.billed_usd() > 0


def stops_at(cap_usd: float, url: str, ledger: Path, asks: int) -> float:
    """Ask for more than a cap allows; return what the ledger says was spent."""

    async def run() -> float:
        async with opened(ledger, endpoint(url, max_usd=cap_usd)) as site:
            with pytest.raises(MoneySpent, match=r"--endpoint\.max-usd"):
                await site.ask_all([ask(n) for n in range(asks)])
            assert not site.ledger.open, "what was on its way was waited for"
            return site.desk.purse.spent_usd

    return asyncio.run(run())


@pytest.mark.parametrize("caps", [2, pytest.param(50, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("faults", "least"),
    [
        pytest.param({"429_ms": 0.05, "500": 0.02, "refusal": 0.05}, 0.97, id="none lost"),
        pytest.param(EVERY_FAULT, 0.0, id="some lost"),
    ],
)
def test_the_cap_is_never_passed_and_nearly_used(
    tmp_path: Path, caps: int, faults: dict[str, float], least: float
) -> None:
    rng = random.Random(7)
    most_usd = 0.008  # the largest reservation of these pictures, 64 x 48, and this prompt
    for number in range(caps):
        cap = most_usd * rng.uniform(50, 120)
        config = ServerConfig(faults=faults, seed=number, retry_after_s=0)
        with serving(config, tmp_path / f"{number}.jsonl") as provider:
            asks = int(cap / 0.0015)
            spent = stops_at(cap, provider.url, tmp_path / f"ledger-{number}", asks)
            assert provider.billed_usd() <= spent + 1e-9 <= cap + 1e-9
            assert provider.billed_usd() >= least * cap


def test_a_refused_image_has_another_key_with_another_prompt(tmp_path: Path) -> None:
    config = ServerConfig(refuse_unless_prompt_sha=sha(BASE_2026_11.text.encode()))
    with serving(config, tmp_path / "provider.jsonl") as provider:

        async def run() -> tuple[Any, Any]:
            async with opened(tmp_path / "ledger", endpoint(provider.url)) as site:
                return await site.desk.ask(ask(1)), await site.desk.ask(ask(1, BASE_2026_11))

        refused, answered = asyncio.run(run())
    assert refused.reply.reject == Reject.REFUSED
    assert answered.reply.text


def test_an_image_that_always_fails_is_a_reject_when_others_are_answered(tmp_path: Path) -> None:
    bad = ask(3)
    config = ServerConfig(always=(Always(outcome="500", image_sha=sha(bad.image)),))
    with serving(config, tmp_path / "provider.jsonl") as provider:

        async def run() -> list[Any]:
            where = endpoint(provider.url, max_tries=2)
            async with opened(tmp_path / "ledger", where) as site:
                return await site.ask_all([ask(n) for n in range(6)])

        answers = asyncio.run(run())
    assert [one.reject if not isinstance(one, Paid) else None for one in answers] == [
        Reject.NO_ANSWER if n == 3 else None for n in range(6)
    ]


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        ("500", TeacherBusy),
        ("drop_before", TeacherBusy),
        ("400", TeacherUnusable),
        ("401", TeacherUnusable),
        ("429_quota", TeacherUnusable),
    ],
)
def test_a_provider_that_answers_nobody_ends_the_job(
    tmp_path: Path, outcome: str, error: type[Exception]
) -> None:
    config = ServerConfig(always=(Always(outcome=outcome),))
    with serving(config, tmp_path / "provider.jsonl") as provider:

        async def run() -> None:
            where = endpoint(provider.url, max_tries=2)
            async with opened(tmp_path / "ledger", where) as site:
                with pytest.raises(error):
                    await site.ask_all([ask(n) for n in range(12)])
                assert not site.ledger.open

        asyncio.run(run())


def test_a_bad_image_that_is_the_last_one_does_not_block_the_collection(tmp_path: Path) -> None:
    bad = ask(3)
    config = ServerConfig(always=(Always(outcome="500", image_sha=sha(bad.image)),))
    with serving(config, tmp_path / "provider.jsonl") as provider:

        async def run() -> Any:
            where = endpoint(provider.url, max_tries=2)
            async with opened(tmp_path / "ledger", where) as site:
                await site.desk.ask(ask(1))
                return await site.desk.ask(bad)

        assert asyncio.run(run()).reject == Reject.NO_ANSWER


def test_a_refused_request_is_a_reject_and_not_kept_for_an_answer(tmp_path: Path) -> None:
    bad = ask(3)
    config = ServerConfig(always=(Always(outcome="400", image_sha=sha(bad.image), tries=1),))
    with serving(config, tmp_path / "provider.jsonl") as provider:

        async def run() -> tuple[Any, Any]:
            async with opened(tmp_path / "ledger", endpoint(provider.url)) as site:
                return await site.desk.ask(bad), await site.desk.ask(bad)

        refused, answered = asyncio.run(run())
    assert refused.reject == Reject.BAD_REQUEST
    assert answered.reply.text


def test_a_desk_that_is_stopped_sends_nothing_more(tmp_path: Path) -> None:
    with serving(ServerConfig(latency_s=0.5), tmp_path / "provider.jsonl") as provider:

        async def run() -> int:
            limits = Limits(requests_per_min=60, in_flight=10)
            async with opened(tmp_path / "ledger", endpoint(provider.url, limits=limits)) as site:
                asking = asyncio.gather(
                    *(site.desk.ask(ask(n)) for n in range(10)), return_exceptions=True
                )
                while not site.ledger.open:
                    await asyncio.sleep(0.01)
                await site.desk.stop()
                assert not site.ledger.open
                return sum(isinstance(one, Paid) for one in await asking)

        answered = asyncio.run(run())
        assert answered == len(provider.entries("request")) == 1


def test_an_overtaken_desk_sends_nothing_more(tmp_path: Path, provider: Running) -> None:
    async def run() -> None:
        async with opened(tmp_path / "ledger", endpoint(provider.url)) as site:
            await site.desk.ask(ask(1))
            Storage(str(tmp_path / "ledger")).put("lease/000002.json", b"{}")
            with pytest.raises(LeaseLost, match="writer 2 took over"):
                await site.desk.ask(ask(2))

    asyncio.run(run())
    assert len(provider.entries("request")) == 1


def test_what_was_on_its_way_at_a_kill_is_charged_in_full_and_asked_again(tmp_path: Path) -> None:
    with serving(ServerConfig(latency_s=30.0), tmp_path / "provider.jsonl") as provider:

        async def killed() -> None:
            async with opened(tmp_path / "ledger", endpoint(provider.url, timeout_s=60)) as site:
                asking = asyncio.create_task(site.desk.ask(ask(1)))
                while not site.ledger.open:
                    await asyncio.sleep(0.01)
                site.desk._asking[site.desk.key(ask(1))].cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking

        asyncio.run(killed())
    with serving(ServerConfig(), tmp_path / "provider-2.jsonl") as provider:

        async def again() -> tuple[list[Any], Any, float]:
            async with opened(tmp_path / "ledger", endpoint(provider.url), writer=2) as site:
                before = site.desk.purse.spent_usd
                return site.ledger.lost, await site.desk.ask(ask(1)), before

        lost, answer, before = asyncio.run(again())
    assert [(one.row, one.job, one.why) for one in lost] == [("000001", JOB, "its job ended")]
    assert before == pytest.approx(lost[0].usd)
    assert answer.reply.text
