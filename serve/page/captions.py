# SPDX-License-Identifier: Apache-2.0
"""Captions of many uploads, in calls of as many images as the server takes."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serve.page.client import ApiClient, Caption, Refused

_AT_FAULT: Final = re.compile(r"images\.(\d+)")
_BUSY: Final = (429, 503)
_GONE: Final = "the upload is not kept any more; upload it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionCalls:
    """How many images go into one call, and how long a busy server is asked again."""

    max_images: int
    max_bytes: int
    """Of the images of a call, before base64."""
    max_waits: int = 5
    """How often one call waits for as long as the server says."""
    max_wait_s: float = 60.0
    """Who has to wait longer, as for the next day of a quota, is told so instead."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """What became of an upload: a caption, or why there is none."""

    file: Path
    caption: Caption | None
    error: str = ""

    def record(self) -> dict[str, Any]:
        """Return it as it is downloaded."""
        if self.caption is None:
            return {"file": self.file.name, "error": self.error}
        made = self.caption
        said = {"caption": made.text, "tokens": made.num_tokens, "flags": list(made.flags)}
        return {"file": self.file.name, **said}


@dataclass(frozen=True, slots=True)
class Captioner:
    """Whom to ask, and how."""

    client: ApiClient
    key: str
    calls: CaptionCalls
    model: str | None = None
    """None leaves the choice to the server."""
    instruction: str | None = None
    """None is the model's own."""

    async def run(self, files: Sequence[Path]) -> AsyncGenerator[list[Captioned], None]:
        """Yield what became of the uploads, call by call and in their order.

        Raises:
            Refused: for no image, but for the key, the model, or a server that is away.
        """
        for batch in _batches(files, self.calls):
            images = {file: await asyncio.to_thread(_read, file) for file in batch}
            done = [Captioned(one, None, _GONE) for one in batch if images[one] is None]
            left = [one for one in batch if images[one] is not None]
            async for one in self._called(left, [images[one] or b"" for one in left]):
                done.append(one)
            yield sorted(done, key=lambda one: batch.index(one.file))

    async def _called(
        self, files: Sequence[Path], images: Sequence[bytes]
    ) -> AsyncGenerator[Captioned, None]:
        """Ask until all are answered; the server names an image that it refuses."""
        left, waits = list(range(len(files))), 0
        while left:
            try:
                made = await self._ask([images[one] for one in left])
            except Refused as error:
                at = _at_fault(error, len(left))
                if at is not None:
                    yield Captioned(files[left.pop(at)], None, error.words())
                elif waits < self.calls.max_waits and self._may_wait(error):
                    waits += 1
                    await asyncio.sleep(error.retry_after_s or 0)  # as the server says
                else:
                    raise
            else:
                for one, caption in zip(left, made, strict=True):
                    yield Captioned(files[one], caption)
                return

    def _may_wait(self, error: Refused) -> bool:
        wait_s = error.retry_after_s
        return error.status in _BUSY and wait_s is not None and wait_s <= self.calls.max_wait_s

    async def _ask(self, images: Sequence[bytes]) -> list[Caption]:
        return await self.client.captions(
            self.key, images, model=self.model, instruction=self.instruction
        )


def _batches(files: Sequence[Path], calls: CaptionCalls) -> Iterator[list[Path]]:
    """Divide files into calls; one that is too large for any goes alone, and is refused."""
    batch: list[Path] = []
    num_bytes = 0
    for file in dict.fromkeys(files):  # a file that was chosen twice has one place on disk
        size = file.stat().st_size if file.exists() else 0
        if batch and (len(batch) == calls.max_images or num_bytes + size > calls.max_bytes):
            yield batch
            batch, num_bytes = [], 0
        batch.append(file)
        num_bytes += size
    if batch:
        yield batch


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _at_fault(error: Refused, num_sent: int) -> int | None:
    """Return which of the images a call was refused for."""
    named = _AT_FAULT.match(error.param or "")
    if named and int(named[1]) < num_sent:
        return int(named[1])
    return 0 if num_sent == 1 and error.status in (400, 413) else None
