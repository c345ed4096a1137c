# SPDX-License-Identifier: Apache-2.0
"""A crowd of clients: aborts leave nothing behind, overload is refused, quotas divide."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable

import httpx
import pytest

from tests.serving.site import (
    CHAT,
    MODEL,
    Seen,
    Server,
    ask,
    at_rate,
    counted,
    keys,
    lines_of,
    post,
    processes,
)
from tests.waiting import eventually

pytestmark = [pytest.mark.serving, pytest.mark.soak, pytest.mark.timeout(900)]
STREAMS, AT_ONCE, PROMPTS = 1000, 64, 16


def handles() -> int:
    return sum(one.num_fds() for one in processes())


async def text_of(client: httpx.AsyncClient, number: int) -> str:
    answer = (await client.post(CHAT, json=ask(f"Prompt {number % PROMPTS}"))).json()
    return str(answer["choices"][0]["message"]["content"])


async def stream(client: httpx.AsyncClient, number: int, *, leave_after: int | None) -> str | None:
    """Read a stream; leave after so many lines of it, or never."""
    body = ask(f"Prompt {number % PROMPTS}", stream=True)
    async with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        lines = []
        async for line in response.aiter_lines():
            lines.append(line)
            if leave_after is not None and len(lines) > leave_after:
                return None
    *chunks, done = lines_of("\n\n".join(line for line in lines if line))
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    return "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)


async def crowd(server: Server, streams: int) -> tuple[list[str], list[str | None], list[bool]]:
    draw = random.Random(5)
    leaves = [draw.random() < 0.5 for _ in range(streams)]
    after = [draw.randrange(0, 16) for _ in range(streams)]
    room = asyncio.Semaphore(AT_ONCE)

    async def one(client: httpx.AsyncClient, number: int) -> str | None:
        async with room:
            leave = after[number] if leaves[number] else None
            return await stream(client, number, leave_after=leave)

    async with server.client() as client:
        expected = [await text_of(client, number) for number in range(PROMPTS)]
        said = await asyncio.gather(*(one(client, number) for number in range(streams)))
    return expected, list(said), leaves


def test_a_thousand_streams_of_which_half_are_left_leave_nothing_behind(server: Server) -> None:
    engine = {**MODEL["engine"], "capacity": AT_ONCE, "latency_s": 0.02}
    server.deploy(
        models=[{**MODEL, "engine": engine, "max_ongoing": 2 * AT_ONCE, "max_queued": 256}]
    )
    asyncio.run(crowd(server, 200))  # opens what the first streams open
    eventually(lambda: server.busy() == 0, within_s=5.0)
    before = handles()
    expected, said, leaves = asyncio.run(crowd(server, STREAMS))
    eventually(lambda: server.busy() == 0, within_s=5.0)
    print(f"{before} handles before, {handles()} after")
    eventually(lambda: handles() <= before, within_s=5.0)
    for number, (text, left) in enumerate(zip(said, leaves, strict=True)):
        if not left:
            assert text == expected[number % PROMPTS]
    assert 400 < sum(leaves) < 600
    # The exporter tells once in ten seconds; what it tells is what was so then.
    eventually(lambda: counted("requests_cancelled_total") > 0.5 * sum(leaves), within_s=30.0)
    eventually(lambda: counted("requests_in_flight") == 0, within_s=30.0)


def test_beyond_capacity_what_is_accepted_is_as_fast_and_the_rest_is_told_when_to_come(
    server: Server,
) -> None:
    # 8 rows of 20 tokens of 50 ms each: 8 requests a second.
    engine = {**MODEL["engine"], "latency_s": 0.05}
    server.deploy(models=[{**MODEL, "engine": engine, "max_ongoing": 8, "max_queued": 4}])

    async def body() -> tuple[Seen, Seen]:
        at_capacity, beyond = Seen(), Seen()
        async with server.client() as client:

            def send(seen: Seen) -> Callable[[int], Awaitable[None]]:
                return lambda number: post(client, ask(f"Say {number}", max_tokens=20), seen)

            await at_rate(7.5, 20.0, send(at_capacity))
            await at_rate(24.0, 120.0, send(beyond))
        return at_capacity, beyond

    at_capacity, beyond = asyncio.run(body())
    print(
        f"at capacity {len(at_capacity.seconds) / 20:.1f}/s P95 {at_capacity.percentile(95):.2f} s;"
        f" at 3x {len(beyond.seconds) / 120:.1f}/s P95 {beyond.percentile(95):.2f} s,"
        f" {beyond.statuses}"
    )
    assert set(at_capacity.statuses) == {200}
    assert set(beyond.statuses) == {200, 503}
    assert sum(beyond.statuses.values()) == 24 * 120  # nothing hangs
    assert beyond.percentile(95) <= 2 * at_capacity.percentile(95)
    assert len(beyond.seconds) / 120 >= 0.85 * len(at_capacity.seconds) / 20
    for refusal in beyond.refusals:
        assert int(refusal.headers["retry-after"]) >= 1
        assert refusal.json()["error"]["code"] == "overloaded"


def test_two_keys_with_quotas_three_to_one_get_three_to_one(server: Server) -> None:
    auth = keys(
        server.folder,
        {"name": "large", "key": "sg4v-large", "quota": {"requests_per_min": 360}},
        {"name": "small", "key": "sg4v-small", "quota": {"requests_per_min": 120}},
    )
    server.deploy(auth=auth, ingress_replicas=2, models=[MODEL])

    async def body() -> tuple[Seen, Seen]:
        seen = Seen(), Seen()

        async def spend(client: httpx.AsyncClient, key: str, found: Seen) -> None:
            async def send(number: int) -> None:
                how = {"authorization": f"Bearer {key}"}
                await post(client, ask("Say", max_tokens=1), found, headers=how)

            await at_rate(12.0, 60.0, send)

        async with server.client() as client:
            names = ("sg4v-large", "sg4v-small")
            pairs = zip(names, seen, strict=True)
            await asyncio.gather(*(spend(client, key, found) for key, found in pairs))
        return seen

    large, small = asyncio.run(body())
    print(f"large {large.statuses}, small {small.statuses}")
    for found in (large, small):
        assert set(found.statuses) == {200, 429}
        for refusal in found.refusals:
            assert int(refusal.headers["retry-after"]) >= 1
    assert large.statuses[200] / small.statuses[200] == pytest.approx(3, rel=0.1)


def test_who_leaves_at_any_moment_keeps_no_place(server: Server) -> None:
    """A key may have one request open; 200 times its caller leaves in the first 20 ms."""
    auth = keys(server.folder, {"name": "one", "key": "k", "quota": {"concurrency": 1}})
    server.deploy(auth=auth, models=[MODEL])
    body, draw = json.dumps(ask("Say", max_tokens=1)), random.Random(7)
    address = server.url.removeprefix("http://")
    request = (
        f"POST {CHAT} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer k\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    )

    async def leave() -> None:
        host, port = address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request.encode())
        await writer.drain()
        await asyncio.sleep(draw.uniform(0.0, 0.02))
        writer.close()

    def is_free() -> bool:
        header = {"authorization": "Bearer k"}
        return httpx.get(f"{server.url}/v1/models", headers=header).status_code == 200

    async def crowd() -> None:
        for _ in range(200):
            await leave()

    asyncio.run(crowd())
    eventually(is_free, within_s=5.0)
