# SPDX-License-Identifier: Apache-2.0
"""A note is on storage before it counts, and what is on storage is known to the next job."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_ray.captions import ledger as ledgers
from sg4v_ray.captions.ledger import KILLED, Ledger, Sent
from sg4v_ray.captions.teacher import Reply
from sg4v_ray.core.errors import ArtifactCorrupt, LeaseLost
from sg4v_ray.core.storage import Storage

pytestmark = pytest.mark.teacher

JOB = "captions@v1"
REPLY = Reply(
    text="A dog.",
    reject=None,
    detail=None,
    finish_reason="stop",
    prompt_tokens=9,
    completion_tokens=3,
    usage_is_sound=True,
)


def sent(ticket: str, *, batch: str | None = None) -> Sent:
    return Sent(ticket, f"key-{ticket}", f"row-{ticket}", JOB, 0.25, batch)


@pytest.fixture
def home(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "ledger"))


def test_the_next_job_knows_every_answer_and_what_all_cost(home: Storage) -> None:
    async def first() -> None:
        notes = Ledger(home, writer=1)
        for ticket in "abc":
            await notes.sent(sent(ticket))
        await notes.paid("a", 0.1, REPLY)
        await notes.free("b")
        await notes.lose("c", "timeout")

    asyncio.run(first())
    notes = Ledger(home, writer=2)
    assert notes.answers["key-a"].reply == REPLY
    assert not notes.open
    assert [(one.ticket, one.why) for one in notes.lost] == [("c", "timeout")]
    assert notes.spent_usd[JOB] == pytest.approx(0.1 + 0.25)


def test_a_note_is_there_before_its_call_returns(home: Storage) -> None:
    async def kill_at_once() -> None:
        await Ledger(home, writer=1).sent(sent("a"))

    asyncio.run(kill_at_once())
    assert set(Ledger(home, writer=2).open) == {"a"}


def test_what_was_on_its_way_is_lost_but_a_batch_is_not(home: Storage) -> None:
    async def killed() -> None:
        notes = Ledger(home, writer=1)
        await notes.sent(sent("a"))
        await notes.sent_together([sent("b", batch="x"), sent("c", batch="x")])
        await notes.batch("x", "batch_123", "http://teacher/v1")

    async def next_job() -> Ledger:
        notes = Ledger(home, writer=2)
        lost = await notes.lose_what_was_on_its_way()
        assert [(one.row, one.why) for one in lost] == [("row-a", KILLED)]
        return notes

    asyncio.run(killed())
    notes = asyncio.run(next_job())
    assert set(notes.open) == {"b", "c"}
    assert notes.batches == {"x": ("batch_123", "http://teacher/v1")}
    assert len(Ledger(home, writer=3).lost) == 1, "once lost is not lost again"


def test_an_answer_that_came_after_all_is_kept_and_not_charged_twice(home: Storage) -> None:
    async def run() -> None:
        old, new = Ledger(home, writer=1), None
        await old.sent(sent("a"))
        new = Ledger(home, writer=2)
        await new.lose_what_was_on_its_way()
        await old.paid("a", 0.1, REPLY)

    asyncio.run(run())
    notes = Ledger(home, writer=3)
    assert notes.spent_usd[JOB] == pytest.approx(0.25)
    assert notes.answers["key-a"].reply == REPLY


def test_a_newer_writer_stops_the_older_one_before_it_sends(home: Storage) -> None:
    home.put("lease/000002.json", b"{}")
    with pytest.raises(LeaseLost, match="writer 2 took over"):
        asyncio.run(Ledger(home, writer=1).sent(sent("a")))


def test_a_damaged_note_is_named_with_its_line(home: Storage) -> None:
    home.put("notes/000001-00000001.jsonl", b'{"event":"free","ticket":"a"}\n{"event":"pai')
    with pytest.raises(ArtifactCorrupt, match=r"000001-00000001\.jsonl, line 2"):
        Ledger(home, writer=2)


def test_many_small_objects_become_one_and_nothing_is_forgotten(
    home: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "_MANY_OBJECTS", 5)
    monkeypatch.setattr(ledgers, "_PAUSE_S", 0.0)

    async def first() -> None:
        notes = Ledger(home, writer=1)
        for number in range(10):
            await notes.sent(sent(str(number)))
            await notes.paid(str(number), 0.1, REPLY)

    asyncio.run(first())
    assert len(list(home.list("notes"))) == 20
    merged = Ledger(home, writer=2)
    assert len(list(home.list("notes"))) == 1
    again = Ledger(home, writer=3)
    assert merged.answers == again.answers
    assert len(again.answers) == 10
    assert again.spent_usd[JOB] == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    home = Storage(str(tmp_path_factory.mktemp("any")))
    reply = replace(REPLY, text=text)

    async def run() -> None:
        notes = Ledger(home, writer=1)
        await notes.sent(sent("a"))
        await notes.paid("a", 0.0, reply)

    asyncio.run(run())
    assert Ledger(home, writer=2).answers["key-a"].reply.text == text
