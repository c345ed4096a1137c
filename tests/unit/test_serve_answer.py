# SPDX-License-Identifier: Apache-2.0
"""From an engine's tokens to text: stop texts, deadlines, and engines that break."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from serve.answer import Piece, StopText, answer
from serve.request import Job
from sg4v_ray.core.errors import EngineError
from sg4v_ray.core.records import Turn
from sg4v_ray.inference.engine import Delta, EngineStats, Generation, Request
from sg4v_ray.model.conversation import IGNORE, Conversation

REQUEST = Request(token_ids=(1,), images=(), generation=Generation(max_tokens=60))


@pytest.fixture(scope="module")
def conversation(tiny_model: Path) -> Conversation:
    return Conversation.open(tiny_model, "vicuna_v1")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "a circle "),
        (("circle",), "a "),
        (("circle END", "cir"), "a "),
        (("zebra",), "a circle END of it"),
        (("it!", "i"), "a c"),
        ((), "a circle END of it"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_text_is_cut_however_it_arrives(
    stop: tuple[str, ...], expected: str, size: int
) -> None:
    whole = "a circle END of it"
    cut = StopText(stop)
    shown = ""
    for i in range(0, len(whole), size):
        shown += cut.push(whole[i : i + size])
        assert expected.startswith(shown)
        if cut.found:
            break
    else:
        shown += cut.flush()
    assert shown == expected


class Scripted:
    """An engine that says what it is told, then stops, hangs or ends without a reason."""

    capacity = 1

    def __init__(self, deltas: list[Delta], *, hangs: bool = False) -> None:
        self.closed = False
        self._deltas, self._hangs = deltas, hangs

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        try:
            for delta in self._deltas:
                yield delta
            if self._hangs:
                await asyncio.Event().wait()
        finally:
            self.closed = True


def pieces(
    conversation: Conversation,
    engine: Scripted,
    *,
    stop: tuple[str, ...] = (),
    timeout_s: float = 5,
) -> list[Piece]:
    async def collect() -> list[Piece]:
        job = Job(REQUEST, stop, num_prompt_tokens=1)
        found = answer(engine, job, text=conversation.stream(), timeout_s=timeout_s)
        return [piece async for piece in found]

    return asyncio.run(collect())


def deltas(conversation: Conversation, words: str) -> list[Delta]:
    """Return the tokens of an answer one by one, without its end token."""
    turns = [Turn(role="user", text="What is it?"), Turn(role="assistant", text=words)]
    labels = conversation.sample(turns, num_images=0).labels
    return [Delta((one,)) for one in labels if one != IGNORE][:-1]


def test_the_pieces_of_an_answer_add_up_to_its_text(conversation: Conversation) -> None:
    *first, last = deltas(conversation, "a circle, \u00e9t\u00e9")
    found = pieces(conversation, Scripted([*first, Delta(last.token_ids, "length")]))
    assert "".join(one.text for one in found) == "a circle, \u00e9t\u00e9"
    assert found[-1] == Piece(found[-1].text, len(first) + 1, "length")
    assert all(one.text and one.finish_reason is None for one in found[:-1])


def test_an_answer_ends_at_its_stop_text_and_frees_the_engine(conversation: Conversation) -> None:
    engine = Scripted(deltas(conversation, "a circle END of it"), hangs=True)
    found = pieces(conversation, engine, stop=("END",))
    assert "".join(one.text for one in found) == "a circle "
    assert found[-1].finish_reason == "stop"
    assert engine.closed


def test_an_answer_that_takes_too_long_is_aborted(conversation: Conversation) -> None:
    engine = Scripted(deltas(conversation, "a circle"), hangs=True)
    with pytest.raises(TimeoutError):
        pieces(conversation, engine, timeout_s=0.05)
    assert engine.closed


def test_an_engine_that_ends_without_a_reason_is_an_error(conversation: Conversation) -> None:
    with pytest.raises(EngineError, match="finish reason"):
        pieces(conversation, Scripted(deltas(conversation, "a circle")))
