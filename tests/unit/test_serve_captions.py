# SPDX-License-Identifier: Apache-2.0
"""Images in, captions out: as JSON or as files, one or many, in the order they were sent."""

import base64
import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serve.answer import Piece, answer
from serve.config import Limits, ModelDeployment
from serve.protocol import ApiError
from serve.request import ChatModel, Job
from serve.routes import Entry, Routes
from sg4v_ray.core.artifact import Ref
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.fake import FakeEngine
from sg4v_ray.inference.open import EngineConfig

ENGINE = EngineConfig(kind="fake", capacity=4, max_model_len=400)
DEPLOYMENT = ModelDeployment(
    id="captioner",
    artifact=Ref(name="captioner"),
    root="/nowhere",
    template="vicuna_v1",
    geometry="pad",
    engine=ENGINE,
    generation=Generation(max_tokens=60),
    instruction="Describe it.",
)
LIMITS = Limits(max_body_bytes=400_000, max_caption_images=3)


class InProcess:
    """A backend without Ray, which remembers what it was asked."""

    def __init__(self, folder: Path, model: ChatModel) -> None:
        self.engine, self.jobs = FakeEngine(ENGINE, folder), []  # type: ignore[var-annotated]
        self.refuses: int | None = None
        self._model, self.is_ready = model, True

    async def stream(self, model_id: str, job: Job) -> AsyncGenerator[Piece, None]:
        await self.engine.start()
        found = answer(self.engine, job, text=self._model.conversation.stream(), timeout_s=5)
        async with aclosing(found) as opened:
            async for piece in opened:
                yield piece

    async def ready(self) -> dict[str, bool]:
        return {"chat": self.is_ready}

    async def complete(self, model_id: str, job: Job) -> Piece:
        self.jobs.append(job)
        if self.refuses == len(self.jobs):
            raise ApiError(503, "full", code="overloaded", retry_after_s=1)
        found = [piece async for piece in self.stream(model_id, job)]
        return replace(found[-1], text="".join(one.text for one in found))


@pytest.fixture
def backend(tiny_model: Path) -> InProcess:
    return InProcess(tiny_model, ChatModel.open(DEPLOYMENT, tiny_model))


@pytest.fixture
def client(backend: InProcess) -> Iterator[TestClient]:
    entries = {
        "captioner": Entry(backend._model, created=5, fingerprint="0123"),
        "chat": Entry(
            replace(backend._model, config=replace(DEPLOYMENT, id="chat", instruction=None)),
            created=5,
            fingerprint="0123",
        ),
    }
    with TestClient(Routes(entries, backend, LIMITS).app()) as made:
        yield made


def png(colour: str) -> bytes:
    data = BytesIO()
    Image.new("RGB", (30, 20), colour).save(data, "PNG")
    return data.getvalue()


def uri(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(png(colour)).decode()


def test_files_and_json_ask_the_same_and_get_the_same(
    client: TestClient, backend: InProcess
) -> None:
    colours = ("teal", "red")
    as_json = client.post("/v1/captions", json={"images": [uri(one) for one in colours]})
    files = [("image", ("x.png", png(one), "image/png")) for one in colours]
    as_files = client.post("/v1/captions", files=files)
    assert as_json.status_code == as_files.status_code == 200, as_files.text
    assert as_json.json()["data"] == as_files.json()["data"]
    assert [one["index"] for one in as_json.json()["data"]] == [0, 1]
    first, second, third, fourth = (one.request for one in backend.jobs)
    assert first.token_ids == third.token_ids and (first.images[0] == third.images[0]).all()
    assert (second.images[0] == fourth.images[0]).all()
    assert not (first.images[0] == second.images[0]).all()


def test_the_models_own_instruction_is_asked_unless_another_is_sent(
    client: TestClient, backend: InProcess
) -> None:
    client.post("/v1/captions", json={"images": uri("teal")})
    client.post("/v1/captions", json={"images": uri("teal"), "instruction": "Describe it."})
    client.post("/v1/captions", json={"images": uri("teal"), "instruction": "Which colour?"})
    default, same, other = (one.request.token_ids for one in backend.jobs)
    assert default == same != other


def test_an_answer_says_tokens_and_what_a_batch_job_would_not_keep(client: TestClient) -> None:
    found = client.post("/v1/captions", json={"images": uri("teal"), "max_tokens": 2}).json()
    (caption,) = found["data"]
    assert caption["finish_reason"] == "length" and "cut_off" in caption["flags"]
    assert caption["tokens"] == found["usage"]["completion_tokens"] == 2
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 2
    assert found["model"] == "captioner"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "images: Field required"),
        ({"images": []}, "images"),
        ({"images": [uri("teal")] * 4}, "at most 3 a call"),
        ({"images": ["https://a.b/c.png"]}, "images.0: .*data: URIs only"),
        ({"images": [uri("teal"), "data:;base64,AAAA"]}, "images.1: .*not an image"),
        ({"images": [uri("teal")], "stream": True}, "stream"),
        ({"images": [uri("teal")], "max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(
    client: TestClient, backend: InProcess, body: dict[str, Any], words: str
) -> None:
    found = client.post("/v1/captions", json=body)
    assert found.status_code == 400
    assert re.search(words, found.json()["error"]["message"])
    assert not backend.jobs


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"rubbish", "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\nmuch\r\n--x--\r\n',
         "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n1\r\n--x--\r\n',
         "multipart/form-data; boundary=x"),
    ],
)  # fmt: skip
def test_a_broken_form_is_400(client: TestClient, content: bytes, kind: str) -> None:
    found = client.post("/v1/captions", content=content, headers={"content-type": kind})
    assert found.status_code == 400, found.text


def test_more_files_than_are_taken_are_not_read(client: TestClient) -> None:
    files = [("image", ("x.png", png("teal"), "image/png"))] * 4
    found = client.post("/v1/captions", files=files)
    assert found.status_code == 400
    assert "Too many files" in found.json()["error"]["message"]


def test_a_web_page_of_somebody_else_cannot_upload_where_no_key_is_asked_for(
    client: TestClient,
) -> None:
    files = [("image", ("x.png", png("teal"), "image/png"))]
    found = client.post("/v1/captions", files=files, headers={"origin": "https://evil.example"})
    assert found.status_code == 403


def test_a_refusal_of_one_image_is_the_answer(client: TestClient, backend: InProcess) -> None:
    backend.refuses = 2
    found = client.post("/v1/captions", json={"images": [uri("teal")] * 3})
    assert (found.status_code, found.headers["retry-after"]) == (503, "1")


def test_a_model_that_is_not_there_is_404(client: TestClient) -> None:
    found = client.post("/v1/captions", json={"images": uri("teal"), "model": "none"})
    assert found.status_code == 404
    assert json.loads(found.content)["error"]["code"] == "model_not_found"
