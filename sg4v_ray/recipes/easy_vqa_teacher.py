# SPDX-License-Identifier: Apache-2.0
"""The teacher of the laptop recipe: looks at a drawn shape and describes it in varied prose.

What this teacher is: a program that reads the pixels of drawn shapes. It is not a language model
and it understands nothing else. It stands in for a model of the class of GPT-4V, behind the same
HTTP interface, so that the whole line runs without network and without cost. It never sees a
file name, a question or an answer; what it says comes from the pixels alone.
"""

import base64
import binascii
import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from sg4v_ray.core.images import ImageLimits, Rejected, open_image
from sg4v_ray.sources.shapes import COLORS, Color, Shape

Size = Literal["small", "medium", "large"]
Row = Literal["top", "middle", "bottom"]
Column = Literal["left", "middle", "right"]
Name = TypeVar("Name", Row, Column)


class NotADrawing(ValueError):
    """The image is not one plain shape on a plain background."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the teacher saw."""

    shape: Shape
    color: Color
    size: Size
    row: Row
    column: Column


def look(image: Image.Image) -> Facts:
    """Read the facts from the pixels of an image.

    Raises:
        NotADrawing: nothing stands out from the background, or what does is no known shape.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    background = _most_common(pixels)
    color, coverage = _cover(pixels, background)
    rows, columns = coverage.sum(axis=1), coverage.sum(axis=0)
    width, height = float(rows.max()), float(columns.max())
    return Facts(
        shape=_shape(float(coverage.sum()) / (width * height)),
        color=color,
        size=_size(max(width, height) / max(coverage.shape)),
        row=_third(rows, ("top", "middle", "bottom")),
        column=_third(columns, ("left", "middle", "right")),
    )


def _most_common(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    packed = pixels.reshape(-1, 3) @ np.array((65536, 256, 1))
    _, first, counts = np.unique(packed, return_index=True, return_counts=True)
    most: NDArray[np.float64] = pixels.reshape(-1, 3)[first[counts.argmax()]]
    return most


def _cover(
    pixels: NDArray[np.float64], background: NDArray[np.float64]
) -> tuple[Color, NDArray[np.float64]]:
    """Name the color that stands out, and how much of each pixel (0 to 1) it covers."""
    away = np.abs(pixels - background).sum(axis=2)
    if away.max() < 60:
        raise NotADrawing(f"no pixel differs from the background by more than {away.max():.0f}")
    solid = pixels[away >= 0.9 * away.max()].mean(axis=0)
    color = min(COLORS, key=lambda name: float(np.abs(solid - COLORS[name]).sum()))
    step = solid - background
    return color, np.clip((pixels - background) @ step / (step @ step), 0.0, 1.0)


def _shape(fill: float) -> Shape:
    """Tell shapes apart by the share they fill of the box around them: 1/2, pi/4 or 1."""
    if not 0.4 <= fill <= 1.1:
        raise NotADrawing(f"what is drawn fills {fill:.2f} of the box around it")
    return "triangle" if fill < 0.72 else "circle" if fill < 0.93 else "rectangle"


def _size(share: float) -> Size:
    return "small" if share < 0.25 else "medium" if share < 0.38 else "large"


def _third(profile: NDArray[np.float64], names: tuple[Name, Name, Name]) -> Name:
    """Name the third of the image that the middle of the shape is in."""
    inside = np.flatnonzero(profile > 0.5)
    return names[int((inside[0] + inside[-1] + 1) * 3 / 2 / len(profile))]


_SENTENCES: Final = (
    "A {size} {color} {shape} {where}, on a pale background.",
    "{Where} there is a {size} {color} {shape}, on a pale background.",
    "The {shape} is {color} and {size}, {where}, on a pale background.",
    "The color is {color}. It is a {size} {shape} {where}, on a pale background.",
    "On a pale background, a {color} {shape}, {size}, {where}.",
    "It is {size} and {where}: a {color} {shape}, on a pale background.",
    "The shape is a {shape}. It is {color} and {size}, {where}, on a pale background.",
    "The image shows a {color} {shape}. It is {size}, {where}, on a pale background.",
)


def describe(facts: Facts, rng_seed: int) -> str:
    """Put the facts into one of eight wordings, equal for equal seeds; 10 to 20 words.

    Each fact is told once. What a reader cannot see in the image, here only the choice of the
    wording, is kept small: to a nano model in training it is noise that hides the shape.
    """
    where = _where(facts)
    sentence = random.Random(rng_seed).choice(_SENTENCES)
    return sentence.format(
        shape=facts.shape,
        color=facts.color,
        size=facts.size,
        where=where,
        Where=where.capitalize(),
    )


def _where(facts: Facts) -> str:
    match facts.row, facts.column:
        case "middle", "middle":
            return "in the center"
        case row, "middle":
            return f"at the {row}"
        case "middle", column:
            return f"on the {column}"
        case row, column:
            return f"in the {row} {column}"


class _TextPart(BaseModel):
    type: Literal["text"] = "text"
    text: str


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: dict[str, str]


class _Message(BaseModel):
    role: str
    content: str | list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]]


class _Request(BaseModel):
    model: str
    messages: list[_Message]
    seed: int = 0


class _BadRequest(ValueError):
    """The client asked for something that cannot be answered; becomes HTTP 400."""


MODEL_NAME: Final = "pixel-reader"
_LIMITS: Final = ImageLimits(max_bytes=2**20, max_pixels=2**20)
_IMAGE_TOKENS: Final = 64  # a fixed figure for `usage`, so that budgets have something to count


def build_app() -> FastAPI:
    """Make the HTTP service: POST /v1/chat/completions and GET /v1/models, as OpenAI shapes them.

    The words of the request are ignored: the answer describes its one image. Answers are equal
    for equal image bytes and `seed`.
    """
    app = FastAPI(title=MODEL_NAME)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(_BadRequest, _bad_request)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        listed = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "sg4v-ray"}
        return {"object": "list", "data": [listed]}

    @app.post("/v1/chat/completions")
    def complete(request: _Request) -> dict[str, Any]:
        data = _only_image(request)
        digest = hashlib.sha256(data + str(request.seed).encode()).digest()
        try:
            text = describe(look(_decode(data)), int.from_bytes(digest[:8], "big"))
        except NotADrawing as error:
            raise _BadRequest(f"this teacher describes drawn shapes only: {error}") from error
        return _completion(request, text, digest.hex())

    return app


async def _bad_request(_: object, error: Exception) -> JSONResponse:
    body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=400)


def _parts(request: _Request) -> list[_TextPart | _ImagePart]:
    contents = (message.content for message in request.messages)
    return [part for c in contents for part in ([_TextPart(text=c)] if isinstance(c, str) else c)]


def _only_image(request: _Request) -> bytes:
    urls = [
        part.image_url.get("url", "") for part in _parts(request) if isinstance(part, _ImagePart)
    ]
    if len(urls) != 1:
        raise _BadRequest(f"a request needs exactly one image, this one has {len(urls)}")
    header, found, payload = urls[0].partition("base64,")
    if not header.startswith("data:image/") or not found:
        raise _BadRequest("an image must come as a base64 data:image/ URI")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise _BadRequest(f"the image is not valid base64: {error}") from error


def _decode(data: bytes) -> Image.Image:
    image = open_image(data, _LIMITS)
    if isinstance(image, Rejected):
        raise _BadRequest(f"the image cannot be decoded: {image.reason}, {image.detail}")
    return image


def _completion(request: _Request, text: str, digest: str) -> dict[str, Any]:
    """Fill the shape of an OpenAI chat completion; tokens are counted as words."""
    texts = [part.text for part in _parts(request) if isinstance(part, _TextPart)]
    asked, answered = _IMAGE_TOKENS + len(" ".join(texts).split()), len(text.split())
    total = asked + answered
    usage = {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": total}
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": usage,
    }


@contextmanager
def serve(port: int = 0) -> Iterator[str]:
    """Answer on 127.0.0.1 while the context is open; yields the base URL, which ends in /v1.

    Port 0 takes any free one. There is nothing to wait for: the socket listens before the server
    thread starts, so an early request queues instead of failing.

    Raises:
        OSError: the port is taken.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), name=MODEL_NAME)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
