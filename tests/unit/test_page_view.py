# SPDX-License-Identifier: Apache-2.0
"""What the page shows is text, whatever is in it; and what it remembers is not for ever."""

import base64
import json
import re
from pathlib import Path

import pytest

from serve.config import Auth, ServeConfig
from serve.page.app import asgi
from serve.page.captions import Captioned
from serve.page.client import Caption, Spoken
from serve.page.config import PageConfig
from serve.page.sessions import Sessions, Shown
from serve.page.view import notice, spent, table, talk, thumbnail
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.images import ImageLimits
from tests.unit.serve_site import DEPLOYMENT, png

EVIL = "<img src=http://elsewhere.test/a.png onerror=alert(1)>\"'>"
LIMITS = ImageLimits(max_bytes=10**6, max_pixels=10**6)


def tags(shown: str) -> set[str]:
    return {one.split()[0] for one in re.findall(r"<([^/>]+)>", shown)}


def test_nothing_that_was_typed_or_answered_is_markup() -> None:
    shown = talk([Shown(EVIL, None, EVIL, file="", note=EVIL)])
    assert tags(shown) == {"div", "p"}
    assert shown.count("&lt;img") == 3
    assert tags(notice(EVIL)) == {"p"}
    failed = Captioned(Path(EVIL), None, EVIL)
    made = Captioned(Path(EVIL), Caption(EVIL, 3, (EVIL,)))
    assert "img" not in tags(table([(failed, None), (made, None)], total=2))


def test_an_image_is_named_by_its_place_at_this_server() -> None:
    shown = talk([Shown("", b"x", file="/tmp/it's \"<b>.png")])
    (address,) = re.findall('src="([^"]+)"', shown)
    assert address == "gradio_api/file=/tmp/it%27s%20%22%3Cb%3E.png"


def test_an_answer_grows_until_it_has_a_note() -> None:
    assert 'class="answer grows"' in talk([Shown("a", answer="b")])
    assert 'class="answer"' in talk([Shown("a", answer="b", note="2 tokens")])


@pytest.mark.parametrize(
    ("last", "first_s", "words"),
    [
        (Spoken("", 12, "stop"), 0.254, "12 tokens \u00b7 3.1 s \u00b7 first word after 0.25 s"),
        (Spoken("half"), 0.25, "stopped \u00b7 3.1 s \u00b7 first word after 0.25 s"),
        (Spoken(""), None, "stopped \u00b7 3.1 s"),
    ],
)
def test_what_an_answer_took(last: Spoken, first_s: float | None, words: str) -> None:
    assert spent(last, 3.14, first_s) == words


def test_an_answer_that_was_cut_off_says_so() -> None:
    assert "cut off" in spent(Spoken("", 60, "length"), 1.0, 0.1)


def test_the_table_has_what_is_downloaded() -> None:
    done = [
        Captioned(Path("/up/a.png"), Caption("a r\u00f8d circle", 4, ("cut_off",))),
        Captioned(Path("/up/b.png"), None, "400: this is not an image"),
    ]
    shown = table([(one, None) for one in done], total=3)
    assert "2 of 3 images, 1 without a caption" in shown
    (saved,) = re.findall(r'href="data:application/json;base64,([^"]+)"', shown)
    assert json.loads(base64.b64decode(saved)) == [
        {"file": "a.png", "caption": "a r\u00f8d circle", "tokens": 4, "flags": ["cut_off"]},
        {"file": "b.png", "error": "400: this is not an image"},
    ]


def test_a_thumbnail_is_small_and_of_images_alone() -> None:
    small = thumbnail(png("teal"), LIMITS)
    assert small is not None and small.startswith("data:image/jpeg;base64,")
    assert thumbnail(b"no image", LIMITS) is None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_page_is_its_browsers_and_is_forgotten_in_time() -> None:
    clock = Clock()
    sessions = Sessions(2, keep_s=10, clock=clock)
    first = sessions.open("page", "friend")
    first.conversation.append(Shown("What is it?"))
    assert sessions.open("page", "friend") is first, "to connect again forgets nothing"
    assert sessions.find("page", "stranger") is None
    assert sessions.knows("friend") and not sessions.knows("stranger")
    clock.now = 9.0
    assert sessions.find("page", "friend") is first
    clock.now = 18.0
    assert sessions.find("page", "friend") is first, "it was used since"
    clock.now = 29.0
    assert not sessions.knows("friend")
    assert sessions.open("page", "friend").conversation == []


def test_the_page_that_was_used_longest_ago_makes_room() -> None:
    sessions = Sessions(2, keep_s=10)
    sessions.open("a", "x")
    sessions.open("b", "y")
    sessions.find("a", "x")
    sessions.open("c", "z")
    assert [sessions.knows(one) for one in "xyz"] == [True, False, True]


def test_somebody_elses_page_is_begun_anew() -> None:
    sessions = Sessions(2, keep_s=10)
    sessions.open("a", "x").conversation.append(Shown("secret"))
    assert sessions.open("a", "stranger").conversation == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"route": "/"}, "page.route"),
        ({"route": "chat"}, "page.route"),
        ({"route": "/chat/"}, "page.route"),
        ({"route": "/a b"}, "page.route"),
        ({"route": "/v1/chat"}, "not below /v1"),
        ({"route": "/health"}, "not below /v1"),
        ({"route": "/admin"}, "not below /v1"),
        ({"route": "/-/routes"}, "not below /v1"),
        ({"api": "127.0.0.1:8000"}, "page.api"),
        ({"api": "ftp://server"}, "page.api"),
        ({"api": "http://server/v1"}, "page.api"),
        ({"api": "http://me:secret@server"}, "page.api"),
        ({"max_images": 0}, "max_images"),
        ({"keep_s": 0}, "keep_s"),
        ({"num_cpus": -1.0}, "num_cpus"),
    ],
)
def test_a_wrong_config_of_the_page_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PageConfig(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("api", ["http://127.0.0.1:8000", "https://models.example.org/"])
def test_an_address_of_a_server_is_taken(api: str) -> None:
    assert PageConfig(api=api, route="/tools/chat").api == api


def test_a_server_has_no_page_unless_it_is_said() -> None:
    config = ServeConfig(models=(DEPLOYMENT,), auth=Auth(anonymous=True))
    assert config.page is None
    with pytest.raises(ConfigError, match="has no chat page"):
        asgi(config)
