# SPDX-License-Identifier: Apache-2.0
"""What a provider sees of a limit: nearly all of it in any minute, and never more."""

import asyncio
import bisect
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from sg4v_ray.core.rate import Limits
from tests.teacher.desk_site import ask, endpoint, opened
from tests.teacher_server.config import ServerConfig
from tests.teacher_server.running import Running, serving

pytestmark = [pytest.mark.teacher, pytest.mark.soak, pytest.mark.timeout(600)]

SECONDS = 210


async def ask_for_a_while(root: Path, provider: Running, limits: Limits, asks: int) -> None:
    where = endpoint(provider.url, limits=limits, timeout_s=60.0)
    async with opened(root, where) as site:
        await site.ask_all([ask(n) for n in range(asks)])


def minutes(provider: Running, weight: str | None) -> list[int]:
    """Return what every full minute had, from the first request on, sliding by half a second."""
    entries: list[dict[str, Any]] = provider.entries("request")
    assert {one["outcome"] for one in entries} == {"ok"}
    times = [one["at"] for one in entries]
    sizes = [
        1 if weight is None else one["prompt_tokens"] + one["completion_tokens"] for one in entries
    ]
    sums, found, start = [0, *accumulate(sizes)], [], times[0]
    while start + 60 <= times[-1]:
        first, last = bisect.bisect_left(times, start), bisect.bisect_left(times, start + 60)
        found.append(sums[last] - sums[first])
        start += 0.5
    return found


def test_a_provider_sees_95_to_100_percent_of_both_limits_in_any_minute(tmp_path: Path) -> None:
    config = ServerConfig(latency_s=2.0, random_latency_s=4.0)
    with (
        serving(config, tmp_path / "requests.jsonl") as by_requests,
        serving(config, tmp_path / "tokens.jsonl") as by_tokens,
    ):

        async def both() -> None:
            requests = Limits(requests_per_min=600, in_flight=200)
            # About as many requests, since prompts have about 360 tokens and captions 230.
            tokens = Limits(tokens_per_min=360_000, in_flight=200)
            count = 10 * SECONDS
            await asyncio.gather(
                ask_for_a_while(tmp_path / "a", by_requests, requests, count),
                ask_for_a_while(tmp_path / "b", by_tokens, tokens, count),
            )

        asyncio.run(both())
        requests, tokens = minutes(by_requests, None), minutes(by_tokens, "tokens")
    assert len(requests) > 200
    assert min(requests) >= 570
    assert max(requests) <= 600
    # The first minute books the most for requests whose answers have not come yet.
    later = tokens[120:]
    assert min(later) >= 0.95 * 360_000
    assert max(tokens) <= 360_000
    print(f"requests {min(requests)}..{max(requests)}, tokens {min(later)}..{max(tokens)}")
