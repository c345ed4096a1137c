# SPDX-License-Identifier: Apache-2.0
"""Requests as a captioning job makes them, and the SDK without retries to send them with."""

import base64
import functools
import hashlib
import io
from typing import Any

import openai
from PIL import Image

from tests.teacher_server.running import Running

PROMPT = "Describe this image in detail."


def jpeg(seed: int, width: int = 32, height: int = 32) -> bytes:
    """Draw a small image that no other seed draws."""
    color = tuple(hashlib.sha256(str(seed).encode()).digest()[:3])
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "JPEG", comment=str(seed).encode())
    return file.getvalue()


def sha(data: bytes) -> str:
    """Return the digest that the provider logs."""
    return hashlib.sha256(data).hexdigest()


def fields(image: bytes, text: str = PROMPT, detail: str = "high", **more: Any) -> dict[str, Any]:
    """Return the arguments of a chat completion."""
    url = {"url": "data:image/jpeg;base64," + base64.b64encode(image).decode(), "detail": detail}
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]
    message = {"role": "user", "content": parts}
    return {"model": "gpt-4o", "messages": [message], "max_tokens": 1024, **more}


@functools.cache
def client(running: Running, key: str = "sk-test") -> openai.OpenAI:
    """Return the SDK's client, one for each provider and key."""
    plain = openai.DefaultHttpxClient(verify=False)  # reading certificates takes longer than a test
    return openai.OpenAI(base_url=running.url, api_key=key, max_retries=0, http_client=plain)
