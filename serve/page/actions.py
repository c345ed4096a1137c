# SPDX-License-Identifier: Apache-2.0
"""What happens on the page: connect, ask, stop, clear, caption."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gradio as gr

from serve.page.captions import CaptionCalls, Captioned, Captioner
from serve.page.client import ApiClient, Refused, Spoken
from serve.page.door import COOKIE
from serve.page.sessions import Session, Sessions, Shown
from serve.page.view import STOPPED, notice, spent, table, talk, thumbnail
from sg4v_ray.core.images import ImageLimits

_EVERY_S: Final = 0.05
"""How often a page is brought up to date: eyes are not faster."""
_AT_LEAST_EVERY_S: Final = 1.0
_FORGOTTEN: Final = "this page is not connected (any more); connect again"
_GONE: Final = "the image is not kept any more; upload it again"
_WAIT: Final = "an answer is on its way; wait for it, or stop it"
_NOTHING: Final = "ask something, or attach an image"
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
    keep_s: int
    needs_key: bool
    longest_s: float
    """Of one run of captions; Serve ends whatever takes longer, without a word."""


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
        session = self._sessions.open(*_who(request))
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
        self, asked: dict[str, Any] | None, model: str | None, key: str, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Yield (conversation, question, notice) while an answer grows."""
        session = self._sessions.find(*_who(request))
        asked = asked or {"text": "", "files": []}
        words, file = (asked["text"] or "").strip(), next(iter(asked["files"]), "")
        if session is None or not (words or file):
            yield _SAME, _SAME, notice(_FORGOTTEN if session is None else _NOTHING)
            return
        if session.answering is not None and not session.answering.done():
            yield _SAME, _SAME, notice(_WAIT)
            return
        try:
            image = await asyncio.to_thread(Path(file).read_bytes) if file else None
        except FileNotFoundError:
            yield _SAME, _SAME, notice(_GONE)
            return
        if file:  # in the place of those that nobody answered about
            for other in session.conversation:
                other.image = other.image if other.answer else None
        one = Shown(words, image, file=file)
        session.conversation.append(one)
        yield talk(session.conversation), gr.update(value=None, **_BUSY), ""
        task = asyncio.create_task(self._answer(session, one, model or "", key))
        session.answering = task
        async for shown in _frames(task, lambda: talk(session.conversation)):
            yield shown, _SAME, _SAME
        one.note = one.note or STOPPED  # before it had begun
        error = _refusal(task)
        if error is None or one.answer:
            said = notice(error.words()) if error else ""
            yield talk(session.conversation), gr.update(**_READY), said
            return
        more = _CLEAR if error.status == 400 and len(session.conversation) > 1 else ""
        # As if it had not been asked, to be changed and asked again.
        session.conversation[:] = [other for other in session.conversation if other is not one]
        back = {"text": words, "files": [file] if file else []}
        again = gr.update(value=back, **_READY)
        yield talk(session.conversation), again, notice(error.words() + more)

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
        """End an answer; `ask` sees that it ended, and shows it."""
        session = self._sessions.find(*_who(request))
        if session is not None:
            _end(session.answering)

    def stop_captions(self, request: gr.Request) -> None:
        """End a run of captions; those that were made stay."""
        session = self._sessions.find(*_who(request))
        if session is not None:
            _end(session.captioning)

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Forget a conversation. Return (conversation, question, notice)."""
        session = self._sessions.find(*_who(request))
        if session is None:
            return _SAME, _SAME, notice(_FORGOTTEN)
        _end(session.answering)
        session.conversation.clear()
        return talk([]), gr.update(value=None, **_READY), ""

    async def caption(
        self,
        files: list[str] | None,
        model: str | None,
        instruction: str | None,
        key: str,
        request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Yield (table, notice) while captions come in."""
        session = self._sessions.find(*_who(request))
        paths = [Path(one) for one in dict.fromkeys(files or [])]
        if session is None or not 0 < len(paths) <= self._limits.max_images:
            many = f"choose 1 to {self._limits.max_images} images, not {len(paths)}"
            yield _SAME, notice(_FORGOTTEN if session is None else many)
            return
        whom = Captioner(
            self._client,
            key,
            self._limits.calls,
            model or None,
            (instruction or "").strip() or None,
        )
        done: list[tuple[Captioned, str | None]] = []
        task = asyncio.create_task(self._captions(whom, paths, done))
        session.captioning = task
        yield table([], total=len(paths)), ""
        async for shown in _frames(task, lambda: table(done, total=len(paths))):
            yield shown, _SAME
        if error := _refusal(task):
            yield _SAME, notice(error.words())

    async def _captions(
        self, whom: Captioner, files: list[Path], done: list[tuple[Captioned, str | None]]
    ) -> None:
        try:
            async with asyncio.timeout(self._limits.longest_s), aclosing(whom.run(files)) as runs:
                async for batch in runs:
                    small = await asyncio.to_thread(self._thumbnails, [one.file for one in batch])
                    done += zip(batch, small, strict=True)
        except TimeoutError:
            raise Refused(
                f"stopped after {self._limits.longest_s:.0f} s, as long as a page may wait; "
                "caption the others again"
            ) from None

    def _thumbnails(self, files: list[Path]) -> list[str | None]:
        return [
            thumbnail(one.read_bytes(), self._limits.image) if one.exists() else None
            for one in files
        ]


async def _frames(task: asyncio.Task[Any], show: Callable[[], str]) -> AsyncGenerator[str, None]:
    """Yield what there is to see whenever it changed, until a task ends; leaving ends the task.

    Also now and then when nothing changed: only then Gradio looks whether the page is still open.
    """
    before, looked = "", 0.0
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_EVERY_S)
            now = show()
            if now != before or time.monotonic() - looked >= _AT_LEAST_EVERY_S:
                before, looked = now, time.monotonic()
                yield now
    finally:
        task.cancel()
        await asyncio.wait({task})


def _end(task: asyncio.Task[Any] | None) -> None:
    """End what runs; the server hears of it, because the connection is closed."""
    if task is not None:
        task.cancel()


def _refusal(task: asyncio.Task[Any]) -> Refused | None:
    """Return why a task ended early; None if it did not, or was stopped by its user."""
    if task.cancelled():
        return None
    error = task.exception()
    if error is not None and not isinstance(error, Refused):
        raise error
    return error


def _who(request: gr.Request) -> tuple[str, str]:
    """Return which page of which browser this is."""
    return str(request.session_hash), request.cookies.get(COOKIE, "")
