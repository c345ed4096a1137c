# SPDX-License-Identifier: Apache-2.0
"""From a chat body to an engine's request: what is taken, what is refused, and by which name."""

import base64
import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.config import Limits
from serve.deployment import ModelDeployment
from serve.protocol import ApiError, parse
from serve.request import ChatModel, Job, to_request
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import Turn
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.conversation import Conversation
from sg4v_ray.model.geometry import as_model_sees

ENGINE = EngineConfig(kind="fake", capacity=4, max_model_len=400)
DEPLOYMENT = ModelDeployment(
    id="chat",
    artifact=Ref(name="vlm"),
    root="/nowhere",
    template="vicuna_v1",
    geometry="pad",
    engine=ENGINE,
    generation=Generation(max_tokens=60),
)
LIMITS = Limits(image=ImageLimits(max_bytes=100_000, max_pixels=10_000))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ChatModel:
    return ChatModel.open(DEPLOYMENT, tiny_model)


def png(size: tuple[int, int] = (30, 20), colour: str = "teal") -> bytes:
    data = BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def chat(*messages: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"model": "chat", "messages": list(messages), **fields}).encode()


ASK = user(text("What is it?"))
LOOK = user(image(uri(png())), text("What is it?"))


def job(model: ChatModel, *messages: dict[str, Any], **fields: Any) -> Job:
    return to_request(parse(chat(*messages, **fields)), model=model, limits=LIMITS)


def refused(model: ChatModel, *messages: dict[str, Any], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        job(model, *messages, **fields)
    assert caught.value.status == 400
    return caught.value


# ---- from body to request


def test_pixels_and_token_ids_are_those_of_training(model: ChatModel) -> None:
    found = job(model, LOOK)
    pixels = as_model_sees(Image.open(BytesIO(png())).convert("RGB"), 16, "pad")
    turns = [Turn(role="user", text="What is it?")]
    assert np.array_equal(found.request.images[0], pixels)
    assert found.request.token_ids == model.conversation.prompt(turns, num_images=1).token_ids


def test_text_and_image_come_in_any_order(model: ChatModel) -> None:
    parts = [text("What is"), image(uri(png())), text("it?")]
    expected = job(model, user(image(uri(png())), text("What is\nit?"))).request.token_ids
    assert job(model, user(*parts)).request.token_ids == expected


def test_several_turns_and_a_system_text(model: ChatModel) -> None:
    found = job(
        model,
        {"role": "system", "content": "Be brief."},
        LOOK,
        {"role": "assistant", "content": "a circle", "refusal": None, "tool_calls": []},
        user(text("What colour?")),
    )
    turns = [
        Turn(role="user", text="What is it?"),
        Turn(role="assistant", text="a circle"),
        Turn(role="user", text="What colour?"),
    ]
    expected = model.conversation.prompt(turns, num_images=1, system="Be brief.")
    assert found.request.token_ids == expected.token_ids


@pytest.mark.parametrize("typed", ["<image>", "</s>", "<s>", "<pad>"])
def test_typed_specials_stay_text(model: ChatModel, typed: str) -> None:
    plain = job(model, user(text("What is it?"))).request.token_ids
    found = job(model, user(text(f"What is {typed} it?"))).request.token_ids
    special = {1, 2, 3, 4}
    assert [one for one in found if one in special] == [one for one in plain if one in special]


def test_prompt_tokens_count_expanded_images(model: ChatModel) -> None:
    found = job(model, LOOK)
    assert found.num_prompt_tokens == len(found.request.token_ids) + 3


def test_an_image_without_text_asks_the_models_instruction(model: ChatModel) -> None:
    captioner = replace(model, config=replace(model.config, instruction="What is it?"))
    found = job(captioner, user(image(uri(png())))).request
    assert found.token_ids == job(model, LOOK).request.token_ids
    assert "no text" in refused(model, user(image(uri(png())))).message


def test_generation_is_the_models_unless_the_request_says_otherwise(model: ChatModel) -> None:
    assert job(model, ASK).request.generation == Generation(max_tokens=60)
    found = job(model, ASK, max_tokens=5, temperature=0.5, top_p=0.9, seed=-1, stop="x")
    assert found.request.generation == Generation(
        max_tokens=5, temperature=0.5, top_p=0.9, seed=2**63 - 1
    )
    assert found.stop == ("x",)


def test_sampling_without_a_seed_differs_from_request_to_request(model: ChatModel) -> None:
    seeds = {job(model, ASK, temperature=1).request.generation.seed for _ in range(3)}
    assert len(seeds) == 3


def test_the_default_of_new_tokens_shrinks_to_the_context_but_a_wish_does_not(
    model: ChatModel,
) -> None:
    long = user(text("a " * 260))
    found = job(model, long)
    assert found.request.generation.max_tokens == 400 - found.num_prompt_tokens < 60
    error = refused(model, long, max_tokens=60)
    assert error.code == "context_length_exceeded"
    assert refused(model, user(text("a " * 400))).code == "context_length_exceeded"


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conversation, "prompt", None)
    half = text("a" * 7_000)
    error = refused(model, user(half), {"role": "assistant", "content": "b"}, user(half))
    assert error.code == "context_length_exceeded"
    assert "14001 characters" in str(error)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        pytest.param([ASK, ASK], "alternate", id="two user messages"),
        pytest.param([ASK, {"role": "assistant", "content": "a"}], "alternate", id="no question"),
        pytest.param([{"role": "assistant", "content": "a"}], "alternate", id="assistant first"),
        pytest.param([{"role": "system", "content": "a"}], "alternate", id="system alone"),
        pytest.param([ASK, {"role": "system", "content": "a"}, ASK], "first", id="late system"),
        pytest.param([user(text(" "))], "no text", id="white space"),
        pytest.param([user()], "no text", id="no parts"),
        pytest.param([user(text("a"))] * 65, "64 messages", id="too many messages"),
        pytest.param([LOOK, {"role": "assistant", "content": "a"}, LOOK], "2 images", id="images"),
        pytest.param(
            [{"role": "system", "content": [image(uri(png()))]}, ASK], "only user", id="whose image"
        ),
    ],
)
def test_what_is_no_conversation_is_refused(
    model: ChatModel, messages: list[dict[str, Any]], words: str
) -> None:
    assert words in refused(model, *messages).message


@pytest.mark.parametrize(
    ("url", "code"),
    [
        pytest.param("https://example.org/a.png", "invalid_image_url", id="https"),
        pytest.param("http://169.254.169.254/", "invalid_image_url", id="metadata"),
        pytest.param("file:///etc/passwd", "invalid_image_url", id="file"),
        pytest.param("/etc/passwd", "invalid_image_url", id="path"),
        pytest.param("data:image/png,rawbytes", "invalid_image_url", id="not base64"),
        pytest.param("data:image/png;base64,@@@@", "invalid_base64", id="alphabet"),
        pytest.param("data:image/png;base64,AAA\u00e9", "invalid_base64", id="not ASCII"),
        pytest.param("data:image/png;base64,", "empty_file", id="empty"),
        pytest.param(uri(b"hello there"), "not_an_image", id="text"),
        pytest.param(uri(b"II*\x00 and more"), "format_not_allowed", id="TIFF"),
        pytest.param(uri(png()[:60]), "truncated", id="cut"),
        pytest.param(uri(png((101, 100))), "too_many_pixels", id="pixels"),
        pytest.param(uri(bytes(100_001)), "too_many_bytes", id="bytes"),
        pytest.param(uri(bytes(200_000)), "too_many_bytes", id="bytes, before decoding"),
    ],
)
def test_a_bad_image_is_refused_with_its_reason(model: ChatModel, url: str, code: str) -> None:
    error = refused(model, user(image(url), text("What is it?")))
    assert error.code == code
    assert error.param == "messages.0.content.0.image_url.url"


def test_a_refused_address_says_what_is_accepted(model: ChatModel) -> None:
    assert "data:" in refused(model, user(image("https://example.org/a.png"), text("a"))).message


def test_the_decoders_own_words_stay_inside(model: ChatModel) -> None:
    broken = png()[:40] + b"\xff" * 20 + png()[60:]
    assert refused(model, user(image(uri(broken)), text("a"))).message.endswith(
        "the image is broken"
    )


# ---- fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"top_k": 5}, "top_k"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
    ],
)
def test_a_field_that_we_cannot_honour_is_refused_by_name(
    model: ChatModel, fields: dict[str, Any], param: str
) -> None:
    error = refused(model, **{"messages": [ASK], **fields}) if "messages" in fields else (
        refused(model, ASK, **fields)
    )  # fmt: skip
    assert error.param == param
    assert param.split(".", maxsplit=1)[0] in error.message


def test_fields_that_change_nothing_are_taken(model: ChatModel) -> None:
    found = job(
        model, ASK, n=1, logprobs=False, frequency_penalty=0.0, logit_bias={}, tools=[],
        tool_choice="auto", response_format={"type": "text"}, user="me", store=True, metadata={},
        top_logprobs=None, parallel_tool_calls=True, stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )  # fmt: skip
    assert found.request == job(model, ASK).request


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'{"model": "chat"}', b"\xff", chat(ASK)[:-1] + b"\x00"]
)
def test_what_is_no_chat_body_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError):
        parse(data)


def test_half_a_character_is_refused(model: ChatModel) -> None:
    with pytest.raises(ApiError):
        to_request(
            parse(chat(user(text("X"))).replace(b"X", b"\\ud800")), model=model, limits=LIMITS
        )


def test_an_error_does_not_repeat_what_was_sent(model: ChatModel) -> None:
    secret = "my secret question"
    error = refused(model, {"role": "user", "content": [{"type": "text", "texte": secret}]})
    assert secret not in error.message
    assert "messages.0.content.0" in error.message


def test_a_wrong_field_of_a_part_is_named_as_it_was_sent() -> None:
    content = [{"type": "image_url", "image_url": {"url": 3}}]
    body = {"model": "chat", "messages": [{"role": "user", "content": content, "name": "Ann"}]}
    with pytest.raises(ApiError) as error:
        parse(json.dumps(body).encode())
    assert error.value.param == "messages.0.content.0.image_url.url"


def test_the_name_of_who_speaks_is_taken() -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hello", "name": "Ann"}]}
    assert parse(json.dumps(body).encode()).messages[0].role == "user"


def test_an_unknown_kind_of_part_is_refused(model: ChatModel) -> None:
    part = {"type": "video_url", "video_url": {"url": "data:,"}}
    assert "image_url" in refused(model, user(part)).message


@pytest.mark.parametrize("value", ["[]", "{}", "1"])
def test_a_small_body_that_would_be_large_in_memory_is_refused(value: str) -> None:
    many = ",".join([value] * 150_000)
    data = f'{{"model": "a", "messages": [], "metadata": [{many}]}}'.encode()
    with pytest.raises(ApiError, match="more than 100,000 values"):
        parse(data)


def test_fields_that_change_nothing_are_not_kept() -> None:
    messages = [{"role": "user", "content": "a", "name": "b"}]
    body = parse(json.dumps({"model": "a", "messages": messages, "metadata": {"c": 1}}).encode())
    assert (body.model_extra, body.messages[0].model_extra) == ({}, {})
