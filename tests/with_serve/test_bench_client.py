# SPDX-License-Identifier: Apache-2.0
"""The serving bench's client reads what our server streams."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from jobs._load_client import Endpoint, asking, body
from jobs._load_samples import Sample
from tests.with_serve.conftest import KEY

if TYPE_CHECKING:
    from tests.with_serve.conftest import Server


def ask_once(server: "Server", photo: Path, key: str) -> Sample:
    async def run() -> Sample:
        endpoint = Endpoint(name="ours", url=server.url, model="captioner", key=key)
        async with asking(endpoint) as ask:
            return await ask(body(endpoint.model, photo, 12), time.monotonic())

    return asyncio.run(run())


def test_an_answer_has_tokens_and_times(server: "Server", tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (30, 20), "teal").save(photo)
    sample = ask_once(server, photo, KEY)
    assert (sample.error, sample.completion_tokens) == ("", 12)
    assert 0 < sample.ttft_s <= sample.e2e_s
    assert sample.text


def test_a_refusal_is_a_failure_that_says_why(server: "Server", tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (30, 20), "teal").save(photo)
    assert ask_once(server, photo, "no-key").error.startswith("401: ")
