# SPDX-License-Identifier: Apache-2.0
"""The laptop recipe's teacher: right about pixels, varied in words, OpenAI-shaped over HTTP."""

import base64
import io
import json
import random
import re
from collections.abc import Iterator
from importlib.resources import files

import openai
import pytest
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletionMessageParam
from PIL import Image

from sg4v_ray.recipes import easy_vqa_teacher
from sg4v_ray.recipes.easy_vqa_teacher import Facts, NotADrawing, describe, look
from sg4v_ray.sources import shapes
from sg4v_ray.sources.shapes import COLORS, SHAPES, Scene

RED_CIRCLE = Scene(
    shape="circle", color="red", background=(250, 240, 245), left=80, top=4, width=40, height=40
)
FACTS = look(shapes.render(RED_CIRCLE))


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


URI = data_uri(shapes.render(RED_CIRCLE))


def test_look_names_every_fact() -> None:
    assert Facts(shape="circle", color="red", size="medium", row="top", column="right") == FACTS


def test_look_is_right_about_what_was_drawn() -> None:
    for seed in range(500):
        scene, facts = shapes.scene(seed), look(shapes.draw(seed))
        assert (facts.shape, facts.color) == (scene.shape, scene.color), f"seed {seed}"


def test_look_agrees_with_the_official_answers_of_a_training_sample() -> None:
    train = files("easy_vqa") / "data" / "train"
    questions = json.loads((train / "questions.json").read_text())
    for _, answer, number in random.Random(0).sample(questions, 1000):
        if answer in SHAPES or answer in COLORS:
            with (train / "images" / f"{number}.png").open("rb") as file:
                facts = look(Image.open(file))
            assert answer in (facts.shape, facts.color), f"train image {number}"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        pytest.param(Image.new("RGB", (64, 64), "white"), "no pixel differs", id="blank"),
        pytest.param(Image.effect_noise((64, 64), 100), "fills", id="noise"),
    ],
)
def test_look_refuses_what_is_no_drawing(image: Image.Image, reason: str) -> None:
    with pytest.raises(NotADrawing, match=reason):
        look(image)


def test_prose_names_shape_and_color_once_and_stays_short() -> None:
    for seed in range(300):
        words = re.findall(r"\w+", describe(FACTS, seed).lower())
        assert words.count("circle") == words.count("red") == 1
        assert not {*SHAPES, *COLORS} - {"circle", "red"} & {*words}
        assert 10 <= len(words) <= 20


def test_prose_varies_in_wording_and_order_but_not_for_one_seed() -> None:
    texts = {describe(FACTS, seed) for seed in range(200)}
    assert len(texts) == 8
    assert {text.index("circle") < text.index("red") for text in texts} == {True, False}
    assert describe(FACTS, 7) == describe(FACTS, 7)


def test_equal_seeds_draw_equal_images() -> None:
    assert shapes.draw(3).tobytes() == shapes.draw(3).tobytes()
    assert shapes.draw(3).tobytes() != shapes.draw(4).tobytes()


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        easy_vqa_teacher.serve() as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(*uris: str) -> list[ChatCompletionMessageParam]:
    images = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    message = {"role": "user", "content": [{"type": "text", "text": "Describe it."}, *images]}
    return [message]  # type: ignore[list-item]


def test_openai_sdk_gets_a_description_with_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=ask(URI), seed=5)
    text = answer.choices[0].message.content
    assert text is not None
    assert "circle" in text
    assert "red" in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(text.split())


def test_openai_sdk_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [easy_vqa_teacher.MODEL_NAME]


@pytest.mark.parametrize(
    ("uris", "reason"),
    [
        pytest.param((), "exactly one image", id="no image"),
        pytest.param((URI, URI), "exactly one image", id="two images"),
        pytest.param(("https://example.org/a.png",), "data:image/", id="remote image"),
        pytest.param(("data:image/png;base64,@@@",), "not valid base64", id="not base64"),
        pytest.param(("data:image/png;base64,AAAA",), "cannot be decoded", id="not an image"),
        pytest.param((data_uri(Image.new("RGB", (64, 64))),), "drawn shapes only", id="blank"),
    ],
)
def test_bad_images_get_a_400_that_says_why(
    client: openai.OpenAI, uris: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        client.chat.completions.create(model="any", messages=ask(*uris))
    assert caught.value.type == "invalid_request_error"


def test_a_malformed_request_gets_the_same_error_shape() -> None:
    answer = TestClient(easy_vqa_teacher.build_app()).post("/v1/chat/completions", json={})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
