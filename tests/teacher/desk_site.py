# SPDX-License-Identifier: Apache-2.0
"""A desk without Ray in front of the provider of `tests.teacher_server`, killed where wanted."""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sg4v_ray.captions.batches import Batches, BatchLimits
from sg4v_ray.captions.charges import Ask
from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.ledger import Ledger, Paid
from sg4v_ray.captions.prompts import OBJECTS_2026_11, Prompt
from sg4v_ray.captions.teacher import Endpoint, Reply, Teacher, TeacherConfig
from sg4v_ray.core.price import PriceTable
from sg4v_ray.core.rate import Limits
from sg4v_ray.core.storage import Storage

KEY = "sk-test"
CONFIG = TeacherConfig(model="gpt-4o", max_tokens=512)
PRICES = PriceTable(input_usd_per_mtok=2.5, output_usd_per_mtok=10.0)
JOB = "teacher-captions@v1"


def picture(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a JPEG that no other number gives."""
    out = io.BytesIO()
    color = (number * 7 % 256, number // 36 * 11 % 256, number * 31 % 256)
    image = Image.new("RGB", size, color)
    image.putpixel((number % size[0], number // size[0] % size[1]), (255, 255, 255))
    image.save(out, "JPEG", quality=95, comment=str(number).encode())
    return out.getvalue()


def ask(number: int, prompt: Prompt = OBJECTS_2026_11) -> Ask:
    """Return an ask about the picture of a number."""
    image = picture(number)
    return Ask(f"{number:06d}", image, hashlib.sha256(image).hexdigest(), prompt)


def endpoint(url: str, **changes: object) -> Endpoint:
    """Return an endpoint at a provider, impatient as a test is."""
    settings = {
        "base_url": url,
        "prices": PRICES,
        "timeout_s": 5.0,
        "limits": Limits(in_flight=64),
        **changes,
    }
    return Endpoint(**settings)  # type: ignore[arg-type]


@dataclass
class Open:
    """A desk that is open."""

    desk: Desk
    batches: Batches
    ledger: Ledger

    async def ask_all(self, asks: list[Ask]) -> list[Paid | Reply]:
        """Ask all at once."""
        return await asyncio.gather(*(self.desk.ask(one) for one in asks))


@asynccontextmanager
async def opened(
    root: Path,
    where: Endpoint,
    *,
    writer: int = 1,
    limits: BatchLimits | None = None,
    job: str = JOB,
) -> AsyncIterator[Open]:
    """Open a desk as a job does."""
    ledger = Ledger(Storage(str(root)), writer=writer)
    teacher = Teacher(CONFIG, where, key=KEY)
    desk = Desk(teacher, where, ledger, job=job)
    batches = Batches(desk, teacher, where, limits or BatchLimits(poll_s=0.1))
    try:
        await ledger.lose_what_was_on_its_way()
        desk.purse.spent_usd = ledger.spent_usd[job]
        await batches.resume()
        yield Open(desk, batches, ledger)
    finally:
        await teacher.close()
