# SPDX-License-Identifier: Apache-2.0
"""What changes under load: versions, replicas that die, how many there are, who gets a canary."""

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.serving.site import (
    CHAT,
    MODEL,
    Seen,
    Server,
    ask,
    counted,
    in_thread,
    keys,
    lines_of,
    load,
    processes,
)
from tests.waiting import eventually

pytestmark = [pytest.mark.serving, pytest.mark.soak, pytest.mark.timeout(900)]
ENGINE: dict[str, Any] = {"kind": "fake", "capacity": 8, "max_model_len": 400, "latency_s": 0.02}
V2 = {"name": "vlm", "version": "v2"}


def versions(seen: Seen) -> list[str]:
    return [one["system_fingerprint"] for one in seen.answers]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"min_replicas": 2, "max_replicas": 2}, id="two replicas"),
        pytest.param({"max_surge_percent": 100}, id="one with surge"),
        pytest.param({}, id="one whose requests wait"),
    ],
)
def test_a_rolling_update_fails_no_request(server: Server, how: dict[str, Any]) -> None:
    old = {**MODEL, "engine": ENGINE, **how}
    server.deploy(models=[old])

    async def body() -> Seen:
        seen = Seen()
        async with server.client() as client, load(client, seen, users=8, max_tokens=20):
            await asyncio.sleep(3)
            await in_thread(lambda: server.deploy(models=[{**old, "artifact": V2}]))
            await asyncio.sleep(3)
        return seen

    seen = asyncio.run(body())
    print(f"{seen.statuses}, longest {max(seen.seconds):.1f} s")
    assert set(seen.statuses) == {200}
    found = versions(seen)
    assert len(set(found)) == 2
    assert found[-1] != found[0]


def replica_pids() -> list[int]:
    return [one.pid for one in processes("ServeReplica:sg4v:chat")]


def test_a_killed_replica_fails_no_request(server: Server) -> None:
    server.deploy(models=[{**MODEL, "engine": ENGINE, "min_replicas": 2, "max_replicas": 2}])

    async def body() -> Seen:
        seen = Seen()
        async with server.client() as client, load(client, seen, users=8, max_tokens=20):
            await asyncio.sleep(3)
            first, *_ = await in_thread(replica_pids)
            os.kill(first, signal.SIGKILL)

            def again() -> bool:
                return server.replicas("chat") == 2 and first not in replica_pids()

            await in_thread(lambda: eventually(again, within_s=60))
            await asyncio.sleep(1)
        return seen

    seen = asyncio.run(body())
    print(f"{seen.statuses}, longest {max(seen.seconds):.1f} s")
    assert set(seen.statuses) == {200}


async def listen(client: httpx.AsyncClient, number: int) -> Any:
    usage_too = {"include_usage": True}
    body = ask(f"Stream {number}", stream=True, stream_options=usage_too, max_tokens=30)
    response = await client.post(CHAT, json=body, timeout=300)
    *_, usage, done = lines_of(response.text)
    assert done == "[DONE]"
    return usage["usage"]["completion_tokens"]


def reach(server: Server, count: int) -> float:
    return eventually(lambda: server.replicas("chat") == count, within_s=120)


def test_replicas_come_with_streams_and_go_after_them(server: Server) -> None:
    engine = {**ENGINE, "latency_s": 3.0}  # streams of 24 to 90 s
    server.deploy(
        models=[
            {
                **MODEL,
                "engine": engine,
                "min_replicas": 1,
                "max_replicas": 3,
                "target_ongoing": 2,
                "upscale_delay_s": 2.0,
                "downscale_delay_s": 4.0,
            }
        ]
    )

    async def body() -> list[int]:
        async with server.client() as client:
            crowd = [asyncio.create_task(listen(client, number)) for number in range(6)]
            grown_s = await in_thread(lambda: reach(server, 3))
            assert not any(one.done() for one in crowd), "all streams are running"
            found: list[int] = await asyncio.gather(*crowd)
            # One stream goes on while replicas are taken away.
            last = asyncio.create_task(listen(client, 6))
            shrunk_s = await in_thread(lambda: reach(server, 1))
            assert not last.done(), "and so is this one"
            print(f"1 -> 3 in {grown_s:.0f} s, 3 -> 1 in {shrunk_s:.0f} s, tokens {found}")
            return [*found, await last]

    tokens = asyncio.run(body())
    assert all(8 <= one <= 30 for one in tokens)


def test_a_canary_is_shifted_by_one_command_and_counted_by_itself(server: Server) -> None:
    auth = keys(
        server.folder,
        {"name": "app", "key": "sg4v-app"},
        {"name": "ops", "key": "sg4v-ops", "scopes": ["admin"]},
    )
    canary = {"artifact": V2, "weight": 0.0}
    server.deploy(auth=auth, ingress_replicas=2, models=[{**MODEL, "canary": canary}])

    def drawn() -> set[str]:
        with httpx.Client(headers={"authorization": "Bearer sg4v-app"}, timeout=60) as client:
            answers = [
                client.post(f"{server.url}{CHAT}", json=ask("Say", max_tokens=2)).json()
                for _ in range(20)
            ]
        return {one["system_fingerprint"] for one in answers}

    def shift(*words: str, key: str = "sg4v-ops") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "serve.traffic", *words, "--url", server.url]
        return subprocess.run(
            command, env={**os.environ, "SG4V_API_KEY": key}, text=True, capture_output=True
        )

    [old] = drawn()
    assert shift("chat", "0.5", key="sg4v-app").returncode != 0
    assert "100.0% to vlm@v2" in shift("chat", "promote").stdout
    eventually(lambda: drawn().isdisjoint({old}), within_s=10)
    assert "0.0% to vlm@v2" in shift("chat", "rollback").stdout
    eventually(lambda: drawn() == {old}, within_s=10)
    both = ("vlm@v1", "vlm@v2")

    def counts() -> list[float]:
        return [counted("requests_total", model="chat", version=one) for one in both]

    eventually(lambda: min(counts()) >= 20, within_s=40)
