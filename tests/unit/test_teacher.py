# SPDX-License-Identifier: Apache-2.0
"""A teacher's reply is a caption, a reject with a reason, or an error that says who pays."""

import asyncio
import email.utils
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from sg4v_ray.captions.prompts import PROMPTS, aesthetic, prompt
from sg4v_ray.captions.teacher import (
    AnswerLost,
    Endpoint,
    ImageSent,
    Reply,
    Teacher,
    TeacherConfig,
    TurnedAway,
    answer_key,
    body_of,
    retry_after_s,
    usage_of,
)
from sg4v_ray.core.errors import ConfigError, TeacherUnusable
from sg4v_ray.core.price import PriceTable
from sg4v_ray.core.rejects import Reject

pytestmark = pytest.mark.teacher

CONFIG = TeacherConfig(model="teacher", max_tokens=100)
ENDPOINT = Endpoint(base_url="http://teacher/v1", api_key_env=None)
KEY = "sk-a-secret-key"


def body(content: str | None, finish: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "message": message, "logprobs": None}
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}


def ask(handler: Callable[[httpx2.Request], httpx2.Response]) -> Reply:
    teacher = Teacher(CONFIG, ENDPOINT, key=KEY)
    teacher.client = openai.AsyncOpenAI(
        base_url=ENDPOINT.base_url,
        api_key=KEY,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(handler)),
    )
    return asyncio.run(teacher.ask("Describe.", b"jpeg", ticket="a-ticket"))


@pytest.mark.parametrize(
    ("reply", "reject"),
    [
        pytest.param(body("A red circle. "), None, id="caption"),
        pytest.param(body(" "), Reject.EMPTY_TEXT, id="no text"),
        pytest.param(body(None, refusal="I cannot."), Reject.REFUSED, id="refusal"),
        pytest.param(body("A", finish="content_filter"), Reject.CONTENT_FILTER, id="filter"),
        pytest.param(body("A red", finish="length"), Reject.CUT_OFF, id="cut off"),
        pytest.param({**body("A"), "choices": []}, Reject.EMPTY_TEXT, id="no choice"),
    ],
)
def test_every_reply_has_one_outcome(reply: dict[str, Any], reject: Reject | None) -> None:
    answer = ask(lambda _: httpx2.Response(200, json=reply))
    assert answer.reject == reject
    assert (answer.text is None) == (reject is not None)
    assert (answer.prompt_tokens, answer.completion_tokens) == (9, 5)


def test_a_request_says_what_is_set_and_carries_its_ticket() -> None:
    seen: list[httpx2.Request] = []

    def take(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json=body("ok"))

    ask(take)
    sent = json.loads(seen[0].content)
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("teacher", 100, 0.0)
    text, image = sent["messages"][0]["content"]
    assert text["text"] == "Describe."
    assert image["image_url"]["detail"] == "high"
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert seen[0].headers["X-Client-Request-Id"] == "a-ticket"


@pytest.mark.parametrize("status", [408, 409, 425, 429, 503, 529])
def test_a_busy_teacher_costs_nothing_and_blames_no_image(status: int) -> None:
    with pytest.raises(TurnedAway) as caught:
        ask(lambda _: httpx2.Response(status, headers={"Retry-After": "7"}))
    assert caught.value.is_busy
    assert caught.value.retry_after_s == 7


def test_a_server_error_costs_nothing_and_may_be_the_images_fault() -> None:
    with pytest.raises(TurnedAway) as caught:
        ask(lambda _: httpx2.Response(500))
    assert not caught.value.is_busy


def raising(error: type[httpx2.RequestError]) -> Callable[[httpx2.Request], httpx2.Response]:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise error("broken", request=request)

    return handler


@pytest.mark.parametrize(
    "error",
    [
        httpx2.ConnectError,
        httpx2.ConnectTimeout,
        httpx2.PoolTimeout,
        httpx2.LocalProtocolError,
        httpx2.UnsupportedProtocol,
    ],
)
def test_what_was_never_sent_costs_nothing(error: type[httpx2.RequestError]) -> None:
    with pytest.raises(TurnedAway):
        ask(raising(error))


@pytest.mark.parametrize(
    "handler",
    [
        raising(httpx2.ReadTimeout),
        raising(httpx2.ReadError),
        raising(httpx2.WriteError),
        raising(httpx2.RemoteProtocolError),
        lambda _: httpx2.Response(502),
        lambda _: httpx2.Response(504),
        lambda _: httpx2.Response(200, content=b'{"choices": [{"mess'),
        lambda _: httpx2.Response(200, content=b"\xff\xfe"),
        lambda _: httpx2.Response(200, text="<html>"),
    ],
    ids=["timeout", "read", "write", "dropped", "502", "504", "cut", "bytes", "html"],
)
def test_an_answer_that_did_not_come_whole_may_have_been_paid(
    handler: Callable[[httpx2.Request], httpx2.Response],
) -> None:
    with pytest.raises(AnswerLost):
        ask(handler)


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_model_or_url_stops_the_job_and_says_what_to_check(status: int) -> None:
    with pytest.raises(TeacherUnusable, match=rf"HTTP {status}.*Check the key"):
        ask(lambda _: httpx2.Response(status, json={"error": {"message": "no"}}))


def test_an_empty_account_is_not_taken_for_a_busy_teacher() -> None:
    no_money = {"error": {"message": "add funds", "code": "insufficient_quota"}}
    with pytest.raises(TeacherUnusable, match="add funds"):
        ask(lambda _: httpx2.Response(429, json=no_money))


def test_a_request_that_it_does_not_take_is_a_row_with_a_reason() -> None:
    answer = ask(lambda _: httpx2.Response(400, json={"error": {"message": "image too large"}}))
    assert answer.reject == Reject.BAD_REQUEST
    assert answer.detail is not None
    assert "image too large" in answer.detail


@pytest.mark.parametrize("status", [400, 401, 429, 500, 502])
def test_a_provider_that_repeats_the_key_does_not_get_it_into_our_texts(status: int) -> None:
    try:
        text = str(ask(lambda _: httpx2.Response(status, text=f"bad key {KEY}")).detail)
    except (TurnedAway, AnswerLost, TeacherUnusable) as error:
        text = str(error)
    assert "[API key]" in text
    assert KEY not in text


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "20"}, 20.0),
        ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "-3"}, 0.0),
        ({}, None),
    ],
)
def test_how_long_to_wait_is_read_as_it_is_said(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after_s(headers) == seconds


def test_how_long_to_wait_may_be_a_date() -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after_s({"retry-after": date}) == pytest.approx(30, abs=2)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": 9},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": 9, "completion_tokens": -5},
        {"prompt_tokens": 9.5, "completion_tokens": 5},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 5},
        {"prompt_tokens": 9, "completion_tokens": 101, "total_tokens": 110},
        {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    ],
)
def test_a_usage_that_cannot_be_is_not_believed(usage: Any) -> None:
    assert not usage_of(usage, "three short words", max_tokens=100)[2]


def test_a_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        Endpoint(base_url="https://teacher/v1").key()


@pytest.mark.parametrize("url", ["http://teacher/v1", "ftp://x", "http://127.0.0.1.evil.org/v1"])
def test_a_key_is_not_sent_where_others_can_read_it(url: str) -> None:
    with pytest.raises(ConfigError, match="is not https"):
        Endpoint(base_url=url)
    assert Endpoint(base_url=url, plain_http=True).base_url == url
    assert Endpoint(base_url=url, api_key_env=None).base_url == url
    assert Endpoint(base_url="http://127.0.0.1:8000/v1").api_key_env == "OPENAI_API_KEY"


@pytest.mark.parametrize("key", ["sk-a b", "\u201csk-a\u201d", "sk-a\nb"])
def test_a_key_that_is_none_is_refused_and_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="copy it anew") as caught:
        Endpoint(base_url="https://teacher/v1").key()
    assert "sk-a" not in str(caught.value)


def test_a_line_feed_behind_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert Endpoint(base_url="https://teacher/v1").key() == KEY


def test_an_error_that_quotes_its_headers_is_told_by_name_alone() -> None:
    def quote(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError(f"Illegal header value {KEY!r}", request=request)

    with pytest.raises(AnswerLost, match="ReadError at http://teacher/v1") as caught:
        ask(quote)
    assert KEY not in str(caught.value)


def test_a_cap_without_prices_is_refused_since_nothing_would_be_counted() -> None:
    with pytest.raises(ConfigError, match="prices are 0"):
        Endpoint(base_url="https://teacher/v1", max_usd=5.0)
    prices = PriceTable(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)
    assert Endpoint(base_url="https://teacher/v1", max_usd=5.0, prices=prices).max_usd == 5.0


def test_an_answers_key_is_of_model_prompt_image_and_parameters() -> None:
    def key(config: TeacherConfig = CONFIG, sha: str = "p", image: str = "i", n: int = 1) -> str:
        return answer_key(config, prompt_sha256=sha, image_sha256=image, attempt=n)

    others = [
        key(TeacherConfig(model="other", max_tokens=100)),
        key(TeacherConfig(model="teacher", max_tokens=101)),
        key(TeacherConfig(model="teacher", max_tokens=100, image=ImageSent(quality=91))),
        key(sha="q"),
        key(image="j"),
        key(n=2),
    ]
    assert len({key(), *others}) == 7
    assert key() == key()


def test_the_body_for_a_batch_is_that_of_a_request() -> None:
    assert json.loads(json.dumps(body_of(CONFIG, "Describe.", b"jpeg")))["model"] == "teacher"


def test_prompts_are_found_by_their_dated_name() -> None:
    assert all(one.name == name for name, one in PROMPTS.items())
    assert len({one.sha256 for one in PROMPTS.values()}) == len(PROMPTS)
    with pytest.raises(ConfigError, match="no teacher prompt 'nice'"):
        prompt("nice")


# What each prompt must ask for: the paper, section 3.2 and figure 8.
MUST_ASK = {
    "base": ("detailed", "confidence", "prose", "list"),
    "objects": ("colours", "how many", "doing", "where", "text", "relative"),
    "text": ("text", "quote", "tells"),
    "landmark": ("which landmark", "where in the world", "history"),
    "celebrity": ("name", "role", "does", "expresses"),
    "artwork": ("title", "artist", "style", "genre"),
    "web": ("brands", "text", "kind of picture"),
}


@pytest.mark.parametrize(("kind", "words"), MUST_ASK.items())
def test_a_prompt_asks_for_what_the_paper_asks_of_its_source(
    kind: str, words: tuple[str, ...]
) -> None:
    plain = prompt(f"{kind}-2026-11")
    judged = aesthetic(plain)
    for word in (*words, *MUST_ASK["base"]):
        assert word in plain.text
        assert word in judged.text
    assert "composition" in judged.text
    assert "composition" not in plain.text
    assert "beauty" not in judged.text


def test_a_prompt_without_aesthetic_variant_says_which_have_one() -> None:
    with pytest.raises(ConfigError, match="objects-2026-11"):
        aesthetic(prompt("detailed-2026-11"))
