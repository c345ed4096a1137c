# SPDX-License-Identifier: Apache-2.0
"""What happens on the page: connect, ask, stop, clear, caption."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gradio as gr

from serve.page_captions import CaptionCalls, Captioned, Captioner
from serve.page_client import ApiClient, Refused, Spoken
from serve.page_door import COOKIE
from serve.page_sessions import Session, Sessions, Shown
from serve.page_view import notice, spent, table, talk, thumbnail
from sg4v_ray.core.images import ImageLimits

_EVERY_S: Final = 0.05
"""How often a page is brought up to date: eyes are not faster."""
_FORGOTTEN: Final = "this page is not connected (any more); connect again"
_GONE: Final = "the image is not kept any more; upload it again"
_CLEAR: Final = "; Clear begins a new conversation"
_SAME: Final = gr.skip()
_READY: Final = {"submit_btn": True, "stop_btn": False}
_BUSY: Final = {"submit_btn": False, "stop_btn": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class PageLimits:
    """What the page takes: the server's own limits, so that little is refused only there."""

    image: ImageLimits
    calls: CaptionCalls
    max_images: int
    keep_files_s: int
    needs_key: bool


class Actions:
    """One object serves all who have the page open. Methods return what the page then shows."""

    def __init__(self, client: ApiClient, sessions: Sessions, limits: PageLimits) -> None:
        self._client, self._sessions, self._limits = client, sessions, limits

    async def connect(self, key: str, request: gr.Request) -> tuple[Any, ...]:
        """Try a key. Return (notice, button, work, models to chat, to caption, conversation)."""
        try:
            found = await self._client.models(key)
        except Refused as error:
            return notice(error.words()), _SAME, gr.update(visible=False), _SAME, _SAME, _SAME
        session = self._sessions.open(_page(request), request.cookies.get(COOKIE, ""))
        own = [("Default model", ""), *((one, one) for one in found)]
        return (
            "",
            gr.update(value="Connected", variant="secondary"),
            gr.update(visible=True),
            gr.update(choices=found, value=found[-1] if found else None),
            gr.update(choices=own, value=""),
            talk(session.conversation),
        )

    async def ask(
        self, asked: dict[str, Any], model: str, key: str, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Yield (conversation, question, notice) while an answer grows."""
        session = self._sessions.find(_page(request))
        file = next(iter(asked["files"]), "")
        if session is None or (file and not Path(file).exists()):
            yield _SAME, _SAME, notice(_FORGOTTEN if session is None else _GONE)
            return
        image = await asyncio.to_thread(Path(file).read_bytes) if file else None
        one = Shown(asked["text"].strip(), image, file=file)
        session.conversation.append(one)
        yield talk(session.conversation), gr.update(value=None, **_BUSY), ""
        task = asyncio.create_task(self._answer(session, one, model, key))
        session.answering = task
        async for shown in _frames(task, lambda: talk(session.conversation)):
            yield shown, _SAME, _SAME
        question, words = gr.update(**_READY), ""
        if not task.cancelled() and isinstance(error := task.exception(), Refused):
            more = _CLEAR if error.status == 400 and len(session.conversation) > 1 else ""
            words = notice(error.words() + more)
            if not one.answer:  # as if it had not been asked, to be changed and asked again
                session.conversation.remove(one)
                back = {"text": asked["text"], "files": [file] if file else []}
                question = gr.update(value=back, **_READY)
        elif not task.cancelled():
            task.result()
        yield talk(session.conversation), question, words

    async def _answer(self, session: Session, one: Shown, model: str, key: str) -> None:
        """Fill in an answer. Cancelling this ends the request on the server."""
        began, first_s, last = time.monotonic(), None, Spoken("")
        pieces = self._client.chat(key, model=model, exchanges=session.conversation)
        try:
            async with aclosing(pieces):
                async for last in pieces:
                    first_s = first_s or time.monotonic() - began
                    one.answer += last.text
        finally:
            one.note = spent(last, time.monotonic() - began, first_s)

    def stop(self, request: gr.Request) -> None:
        """End what runs; whoever shows it sees that it ended."""
        session = self._sessions.find(_page(request))
        if session is not None:
            session.stop()

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Forget a conversation. Return (conversation, question, notice)."""
        session = self._sessions.find(_page(request))
        if session is None:
            return _SAME, _SAME, notice(_FORGOTTEN)
        session.stop()
        session.conversation.clear()
        return talk([]), gr.update(value=None, **_READY), ""

    async def caption(
        self, files: list[str] | None, model: str, instruction: str, key: str, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Yield (table, notice) while captions come in."""
        session = self._sessions.find(_page(request))
        paths = [Path(one) for one in dict.fromkeys(files or [])]
        if session is None or not 0 < len(paths) <= self._limits.max_images:
            many = f"choose 1 to {self._limits.max_images} images, not {len(paths)}"
            yield _SAME, notice(_FORGOTTEN if session is None else many)
            return
        whom = Captioner(
            self._client, key, self._limits.calls, model or None, instruction.strip() or None
        )
        done: list[tuple[Captioned, str | None]] = []
        task = asyncio.create_task(self._captions(whom, paths, done))
        session.captioning = task
        yield table([], total=len(paths)), ""
        async for shown in _frames(task, lambda: table(done, total=len(paths))):
            yield shown, _SAME
        if not task.cancelled() and isinstance(error := task.exception(), Refused):
            yield _SAME, notice(error.words())
        elif not task.cancelled():
            task.result()

    async def _captions(
        self, whom: Captioner, files: list[Path], done: list[tuple[Captioned, str | None]]
    ) -> None:
        async with aclosing(whom.run(files)) as batches:
            async for batch in batches:
                small = await asyncio.to_thread(self._thumbnails, [one.file for one in batch])
                done += zip(batch, small, strict=True)

    def _thumbnails(self, files: list[Path]) -> list[str | None]:
        return [
            thumbnail(one.read_bytes(), self._limits.image) if one.exists() else None
            for one in files
        ]


async def _frames(task: asyncio.Task[Any], show: Callable[[], str]) -> AsyncGenerator[str, None]:
    """Yield what there is to see whenever it changed, until a task ends; leaving ends the task."""
    before = ""
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_EVERY_S)
            now = show()
            if now != before:
                before = now
                yield now
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})


def _page(request: gr.Request) -> str:
    return str(request.session_hash)
