# SPDX-License-Identifier: Apache-2.0
"""A teacher's reply is a caption, a reject with a reason, or an error of the right kind."""

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from sg4v_ray.captions.prompts import PROMPTS, prompt
from sg4v_ray.captions.teacher import Endpoint, Teacher, TeacherConfig, outcome
from sg4v_ray.core.errors import ConfigError, TeacherBusy, TeacherUnusable
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.retry import RetryPolicy

CONFIG = TeacherConfig(model="teacher", prompt=next(iter(PROMPTS)))
ENDPOINT = Endpoint(
    base_url="http://teacher/v1", retry=RetryPolicy(max_tries=3, first_delay_s=0.001)
)


def body(
    content: str | None, finish: str = "stop", refusal: str | None = None
) -> dict[str, object]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "message": message, "logprobs": None}
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    common = {"id": "1", "object": "chat.completion", "created": 0, "model": "teacher"}
    return {**common, "choices": [choice], "usage": usage}


@pytest.mark.parametrize(
    ("reply", "reject"),
    [
        pytest.param(body("A red circle. "), None, id="caption"),
        pytest.param(body(" "), Reject.EMPTY_TEXT, id="no text"),
        pytest.param(body(None, refusal="I cannot."), Reject.REFUSED, id="refusal"),
        pytest.param(body("A", finish="content_filter"), Reject.CONTENT_FILTER, id="filter"),
        pytest.param(body("A red", finish="length"), Reject.CUT_OFF, id="cut off"),
    ],
)
def test_every_reply_has_one_outcome(reply: dict[str, object], reject: Reject | None) -> None:
    answer = outcome(ChatCompletion.model_validate(reply))
    assert answer.reject == reject
    assert (answer.text is None) == (reject is not None)
    assert answer.num_tokens == 5


def ask(handler: Callable[[httpx.Request], httpx.Response]) -> object:
    teacher = Teacher(CONFIG, ENDPOINT, key="k", prompt="Describe.")
    teacher._client = openai.AsyncOpenAI(
        base_url=ENDPOINT.base_url,
        api_key="k",
        max_retries=0,
        http_client=httpx.AsyncClient(transport=httpx.MockTransport(handler)),
    )
    return asyncio.run(teacher.caption(b"png"))


def test_a_busy_teacher_is_asked_again() -> None:
    answers = [httpx.Response(429), httpx.Response(503), httpx.Response(200, json=body("ok"))]
    assert ask(lambda _: answers.pop(0)).text == "ok"
    assert not answers


def test_a_teacher_that_stays_busy_is_an_error_not_a_reject() -> None:
    with pytest.raises(TeacherBusy, match="http://teacher/v1"):
        ask(lambda _: httpx.Response(500))


def test_a_dropped_connection_is_busy() -> None:
    def drop(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(TeacherBusy):
        ask(drop)


def test_a_wrong_key_stops_the_job_and_says_what_to_check() -> None:
    with pytest.raises(TeacherUnusable, match=r"answered 401.*Check the key"):
        ask(lambda _: httpx.Response(401, json={"error": {"message": "bad key"}}))


def test_a_request_that_it_does_not_take_is_a_row_with_a_reason() -> None:
    answer = ask(lambda _: httpx.Response(400, json={"error": {"message": "image too large"}}))
    assert answer.reject == Reject.BAD_REQUEST
    assert "image too large" in answer.reject_detail


def test_a_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        ENDPOINT.key()


def test_prompts_are_found_by_their_dated_name() -> None:
    assert all(one.name == name for name, one in PROMPTS.items())
    with pytest.raises(ConfigError, match="no teacher prompt 'nice'"):
        prompt("nice")
