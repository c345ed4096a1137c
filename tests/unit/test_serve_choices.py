# SPDX-License-Identifier: Apache-2.0
"""`n` answers to one request are n requests to the model and one to its key."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.answer import Piece
from serve.choices import merged
from serve.config import Limits
from serve.protocol import ApiError
from sg4v_ray.inference.engine import Generation
from tests.unit.serve_site import DEPLOYMENT, InProcess, make_routes, open_model

pytestmark = pytest.mark.serving

URL = "/v1/chat/completions"


@pytest.fixture
def backend(tiny_model: Path) -> InProcess:
    return InProcess(tiny_model, open_model(tiny_model))


@pytest.fixture
def client(backend: InProcess) -> Iterator[TestClient]:
    app = make_routes(backend, Limits(max_n=3)).app()
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "What is it?"}]
    return client.post(URL, json={"model": "captioner", "messages": messages, **fields})


def test_sampled_answers_differ_and_the_prompt_is_used_once(client: TestClient) -> None:
    one = ask(client, temperature=1.0, seed=5).json()
    three = ask(client, temperature=1.0, seed=5, n=3).json()
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert len(set(texts)) == 3
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_greedy_answers_are_the_same(client: TestClient) -> None:
    choices = ask(client, temperature=0, n=2).json()["choices"]
    assert choices[0]["message"] == choices[1]["message"]


def test_a_stream_holds_every_answer_and_the_usage_of_all(client: TestClient) -> None:
    fields = {"temperature": 1.0, "seed": 5, "n": 3}
    whole = ask(client, **fields).json()
    stream = ask(client, **fields, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = [
        line.removeprefix("data: ") for line in stream.text.split("\n\n") if line
    ]
    said = {0: "", 1: "", 2: ""}
    roles, reasons = [], {}
    for chunk in map(json.loads, chunks):
        [choice] = chunk["choices"]
        said[choice["index"]] += choice["delta"].get("content", "")
        if "role" in choice["delta"]:
            roles.append(choice["index"])
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    assert roles == [0, 1, 2]
    assert said == {one["index"]: one["message"]["content"] for one in whole["choices"]}
    assert reasons == {one["index"]: one["finish_reason"] for one in whole["choices"]}
    assert json.loads(usage)["usage"] == whole["usage"]
    assert done == "[DONE]"


def test_more_answers_than_the_server_gives_are_400_before_any_work(
    client: TestClient, backend: InProcess
) -> None:
    response = ask(client, n=4)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    assert backend.jobs == []


class Streams:
    """Streams that count how many are open."""

    def __init__(self) -> None:
        self.open = 0

    async def say(self, pieces: int, *, fails: bool = False) -> AsyncGenerator[Piece, None]:
        self.open += 1
        try:
            for made in range(1, pieces + 1):
                await asyncio.sleep(0)
                yield Piece("a ", made)
            if fails:
                raise ApiError(503, "gone")
        finally:
            self.open -= 1


@pytest.mark.parametrize("count", [1, 3])
def test_closing_in_the_middle_closes_every_stream(count: int) -> None:
    async def body() -> None:
        streams = Streams()
        pieces = merged([streams.say(100) for _ in range(count)])
        await anext(pieces)
        assert streams.open == count
        await pieces.aclose()
        assert streams.open == 0

    asyncio.run(body())


def test_one_that_fails_closes_the_others() -> None:
    async def body() -> None:
        streams = Streams()
        pieces = merged([streams.say(100), streams.say(2, fails=True)])
        with pytest.raises(ApiError):
            async for _ in pieces:
                pass
        assert streams.open == 0

    asyncio.run(body())


def test_no_piece_is_lost_or_out_of_order() -> None:
    async def body() -> None:
        streams = Streams()
        found: dict[int, list[int]] = {0: [], 1: [], 2: []}
        async for index, piece in merged([streams.say(n) for n in (5, 1, 9)]):
            found[index].append(piece.num_tokens)
        assert found == {0: [*range(1, 6)], 1: [1], 2: [*range(1, 10)]}

    asyncio.run(body())


def test_a_seed_at_its_end_goes_on_at_zero(tiny_model: Path) -> None:
    last = replace(DEPLOYMENT, generation=Generation(max_tokens=5, temperature=1.0))
    assert last.generation.seed == 0
    client = TestClient(make_routes(InProcess(tiny_model, open_model(tiny_model))).app())
    response = ask(client, temperature=1.0, seed=2**63 - 1, n=2)
    assert response.status_code == 200
