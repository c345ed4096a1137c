# SPDX-License-Identifier: Apache-2.0
"""What the page does when it is clicked, without a browser and without a server."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.page.actions import Actions, PageLimits
from serve.page.captions import CaptionCalls
from serve.page.client import ApiClient, Refused, Spoken
from serve.page.door import COOKIE
from serve.page.sessions import Sessions
from tests.unit.serve_site import LIMITS

LIMITS_OF_PAGE = PageLimits(
    image=LIMITS.image,
    calls=CaptionCalls(max_images=3, max_bytes=10**6),
    max_images=2,
    keep_s=60,
    needs_key=True,
    longest_s=5.0,
)


class Server(ApiClient):
    """A client whose server says what a test wants, and notes when it is left."""

    def __init__(self, *script: Spoken | Refused | None) -> None:
        self.script, self.asked, self.is_open = script, 0, False
        self.images: list[bytes] = []

    async def models(self, key: str) -> list[str]:
        return ["captioner", "chat"]

    async def chat(self, key: str, **how: Any) -> AsyncGenerator[Spoken, None]:
        self.asked, self.is_open = len(how["exchanges"]), True
        self.images = [one.image for one in how["exchanges"] if one.image is not None]
        try:
            for one in self.script:
                if isinstance(one, Refused):
                    raise one
                if one is None:
                    await asyncio.Event().wait()  # says nothing, for ever
                else:
                    yield one
        finally:
            self.is_open = False

    async def captions(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()


def asker(session_hash: str = "page") -> Any:
    return SimpleNamespace(session_hash=session_hash, cookies={COOKIE: "friend"})


def actions_over(server: Server, limits: PageLimits = LIMITS_OF_PAGE) -> Actions:
    return Actions(server, Sessions(5, keep_s=60), limits)


def question(text: str = "What is it?", *files: str) -> dict[str, Any]:
    return {"text": text, "files": list(files)}


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 10))


async def connected(server: Server, limits: PageLimits = LIMITS_OF_PAGE) -> Actions:
    actions = actions_over(server, limits)
    await actions.connect("key", asker())
    return actions


async def asked(actions: Actions, said: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [one async for one in actions.ask(said, "chat", "key", asker())]


def test_a_server_that_says_nothing_is_left_with_the_tab() -> None:
    """Gradio closes what it runs when there is something to show, so there is now and then."""

    async def leave() -> Server:
        server = Server(None)
        frames = (await connected(server)).ask(question(), "chat", "key", asker())
        for _ in range(4):
            await anext(frames)
        assert server.is_open
        await frames.aclose()
        return server

    assert not run(leave()).is_open


def test_stop_ends_what_says_nothing_and_the_question_goes_with_the_next() -> None:
    async def stop() -> tuple[Server, Any, Any]:
        server = Server(None)
        actions = await connected(server)
        asking = asyncio.create_task(asked(actions, question()))
        while not server.is_open:
            await asyncio.sleep(0)
        actions.stop(asker())
        first = await asking
        server.script = (Spoken("a circle"), Spoken("", 3, "stop"))
        return server, first[-1], (await asked(actions, question("And which colour?")))[-1]

    server, first, second = run(stop())
    assert 'class="note">stopped' in first[0]
    assert "3 tokens" in second[0]
    assert server.asked == 2


def test_a_new_image_takes_the_place_of_one_that_nobody_answered_about(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(name.encode())

    async def stop() -> Server:
        server = Server(None)
        actions = await connected(server)
        asking = asyncio.create_task(asked(actions, question("A", str(tmp_path / "first"))))
        while not server.is_open:
            await asyncio.sleep(0)
        (told,) = await asked(actions, question("B"))
        assert "wait for it, or stop it" in told[2]
        actions.stop(asker())
        await asking
        server.script = (Spoken("a circle"), Spoken("", 3, "stop"))
        await asked(actions, question("B", str(tmp_path / "second")))
        return server

    server = run(stop())
    assert (server.asked, server.images) == (2, [b"second"])


def test_a_run_of_captions_ends_in_words_before_serve_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")

    async def wait() -> Any:
        actions = await connected(Server(), replace(LIMITS_OF_PAGE, longest_s=0.1))
        frames = actions.caption([str(tmp_path / "a")], None, None, "key", asker())
        return [one async for one in frames][-1]

    assert "caption the others again" in run(wait())[1]


def test_clear_ends_an_answer_and_forgets_all() -> None:
    async def clear() -> tuple[Any, Any]:
        server = Server(Spoken("a circle"), None)
        actions = await connected(server)
        asking = asyncio.create_task(asked(actions, question()))
        while not server.is_open:
            await asyncio.sleep(0)
        cleared = actions.clear(asker())
        return cleared, (await asking)[-1]

    for shown in run(clear()):
        assert 'class="empty"' in shown[0]


def test_what_was_said_before_an_error_stays() -> None:
    async def break_off() -> Any:
        server = Server(Spoken("a circle"), Refused("the model stopped", status=503))
        return (await asked(await connected(server), question()))[-1]

    shown, _, told = run(break_off())
    assert "a circle" in shown
    assert "503: the model stopped" in told


def test_a_refused_question_comes_back_and_says_how_to_go_on() -> None:
    async def refuse() -> tuple[Any, Any]:
        server = Server(Spoken("a circle"), Spoken("", 3, "stop"))
        actions = await connected(server)
        await asked(actions, question())
        server.script = (Refused("2 images", status=400),)
        return (await asked(actions, question("And this?")))[-1], server.asked

    (shown, back, told), count = run(refuse())
    assert "And this?" not in shown
    assert back["value"] == {"text": "And this?", "files": []}
    assert "400: 2 images; Clear begins a new conversation" in told
    assert count == 2


@pytest.mark.parametrize("said", [None, question("  "), question("a", "/gone.png")])
def test_nothing_is_asked_without_words_or_with_an_image_that_is_gone(said: Any) -> None:
    async def nothing() -> tuple[Any, int]:
        server = Server()
        (frame,) = await asked(await connected(server), said)
        return frame, server.asked

    frame, count = run(nothing())
    assert 'role="alert"' in frame[2]
    assert count == 0


def test_who_did_not_connect_can_do_nothing() -> None:
    async def nothing() -> tuple[Server, list[Any]]:
        server = Server(Spoken("a"))
        actions = actions_over(server)
        told = [(await asked(actions, question()))[-1][-1], actions.clear(asker())[-1]]
        captions = actions.caption(["/tmp/a.png"], "", "", "key", asker())
        told += [frame[-1] async for frame in captions]
        return server, told

    server, told = run(nothing())
    assert server.asked == 0
    assert len(told) == 3 and all("connect again" in one for one in told)


@pytest.mark.parametrize("count", [0, 3])
def test_the_number_of_images_is_limited(count: int, tmp_path: Path) -> None:
    async def many() -> list[Any]:
        actions = await connected(Server())
        files = [str(tmp_path / f"{i}.png") for i in range(count)]
        return [one async for one in actions.caption(files, "", "", "key", asker())]

    ((_, told),) = run(many())
    assert f"choose 1 to 2 images, not {count}" in told


def test_a_bug_is_not_hidden() -> None:
    class Broken(Server):
        async def chat(self, key: str, **how: Any) -> AsyncGenerator[Spoken, None]:
            raise ZeroDivisionError
            yield

    async def fail() -> None:
        await asked(await connected(Broken()), question())

    with pytest.raises(ZeroDivisionError):
        run(fail())
