# SPDX-License-Identifier: Apache-2.0
"""Large images: the server stays alive to those who ask, and its memory comes back."""

import asyncio
import time

import numpy as np
import pytest

from tests.serving.site import MODEL, Seen, Server, ask, photo, post, processes
from tests.waiting import eventually

pytestmark = [pytest.mark.serving, pytest.mark.soak, pytest.mark.timeout(900)]
MIB = 2**20


def resident() -> int:
    return sum(one.memory_info().rss for one in processes())


def test_liveness_answers_while_clients_send_images_of_20_megapixels(server: Server) -> None:
    server.deploy(models=[MODEL])
    images = [photo(5000, 4000, seed=seed, quality=60) for seed in range(2)]

    async def body() -> tuple[list[float], Seen]:
        alive: list[float] = []
        seen, over = Seen(), asyncio.Event()

        async def user(number: int) -> None:
            while not over.is_set():
                image = images[number % len(images)]
                await post(client, ask("What?", image=image, max_tokens=2), seen)

        async def probe() -> None:
            until = time.monotonic() + 40
            async with server.client() as own:
                while time.monotonic() < until:
                    began = time.monotonic()
                    assert (await own.get("/health/live")).status_code == 200
                    alive.append(time.monotonic() - began)
                    await asyncio.sleep(0.05)
            over.set()

        async with server.client() as client:
            users = [asyncio.create_task(user(number)) for number in range(8)]
            await asyncio.create_task(probe())
            await asyncio.gather(*users)
        return alive, seen

    alive, seen = asyncio.run(body())
    p50, p99 = (float(np.percentile(alive, share)) * 1000 for share in (50, 99))
    print(
        f"{len(alive)} probes: P50 {p50:.0f} ms, P99 {p99:.0f} ms; "
        f"{len(seen.seconds)} images of 20 megapixels, {len(images[0]) / MIB:.1f} MB each"
    )
    assert set(seen.statuses) == {200}
    assert len(seen.seconds) >= 16
    assert p99 <= 250


def test_memory_comes_back_after_500_bodies_of_5_megabytes(server: Server) -> None:
    server.deploy(models=[MODEL])
    images = [photo(1500, 1200, seed=seed, kind="PNG", compress_level=1) for seed in range(4)]
    assert all(4 * MIB < len(one) < 6 * MIB for one in images)

    async def send(count: int) -> Seen:
        seen, room = Seen(), asyncio.Semaphore(8)

        async def one(number: int) -> None:
            async with room:
                await post(client, ask("What?", image=images[number % 4], max_tokens=2), seen)

        async with server.client() as client:
            await asyncio.gather(*(one(number) for number in range(count)))
        return seen

    asyncio.run(send(50))  # what every first request loads and opens
    before = resident()
    seen = asyncio.run(send(500))
    assert seen.statuses == {200: 500}
    highest = resident()
    eventually(lambda: resident() <= 1.1 * before, within_s=30.0)
    print(
        f"{before / MIB:.0f} MB before, {highest / MIB:.0f} at the end, "
        f"{resident() / MIB:.0f} after"
    )
