# SPDX-License-Identifier: Apache-2.0
"""A hundred asks that go to a provider in batches, or online."""

from pathlib import Path
from typing import Any

import pytest

from sg4v_ray.captions.batches import BatchLimits
from sg4v_ray.captions.ledger import Paid
from tests.teacher.desk_site import ask, endpoint, opened
from tests.teacher_server.running import Running

LIMITS = BatchLimits(max_requests=25, max_bytes=10**6, poll_s=0.1)
ASKS = [ask(n) for n in range(100)]


async def in_batches(
    root: Path,
    provider: Running,
    writer: int = 1,
    *,
    limits: BatchLimits = LIMITS,
    **changes: Any,
) -> float:
    """Send all asks in batches and wait for them; return what was spent."""
    where = endpoint(provider.url, **changes)
    async with opened(root, where, writer=writer, limits=limits) as site:
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
        paid = [one for one in answers if isinstance(one, Paid)]
        assert len(paid) == len(answers)
        return paid
