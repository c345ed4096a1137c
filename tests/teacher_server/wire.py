# SPDX-License-Identifier: Apache-2.0
"""A chat request as OpenAI documents it, reduced to what a caption and its price depend on."""

import base64
import binascii
import hashlib
import io
import json
import math
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image, UnidentifiedImageError

CHAT: Final = "/v1/chat/completions"

_IMAGE_BASE_TOKENS: Final = 85
_TILE_TOKENS: Final = 170
_TILE_PX: Final = 512
_FIT_PX: Final = 2048
_SHORT_SIDE_PX: Final = 768


class BadRequest(ValueError):
    """The request cannot be answered; becomes HTTP 400 in OpenAI's error shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One image and what is asked about it."""

    model: str
    image_sha: str
    prompt_sha: str
    prompt_tokens: int
    max_tokens: int | None


def image_tokens(width_px: int, height_px: int, detail: str) -> int:
    """Count what an image costs.

    Source:
        OpenAI's vision guide, "Calculating costs" of GPT-4V and GPT-4o. It scales "such that the
        shortest side is 768px long"; smaller images stay as they are, as its price calculator
        has it (512 x 512 is 255 tokens).
    """
    if detail == "low":
        return _IMAGE_BASE_TOKENS
    fit = min(1.0, _FIT_PX / max(width_px, height_px))
    width, height = width_px * fit, height_px * fit
    shrink = min(1.0, _SHORT_SIDE_PX / min(width, height))
    tiles = _tiles(width * shrink) * _tiles(height * shrink)
    return _IMAGE_BASE_TOKENS + _TILE_TOKENS * tiles


def _tiles(side_px: float) -> int:
    return max(1, math.ceil(round(side_px) / _TILE_PX))


def parse(body: bytes) -> Ask:
    """Read a request body.

    Raises:
        BadRequest: it is no JSON, or not one user message with text and one JPEG.
    """
    try:
        return parse_fields(json.loads(body))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"We could not parse the JSON body of your request: {error}") from error


def parse_fields(fields: Any) -> Ask:
    """Read a request that is JSON already, as a line of a batch has it."""
    try:
        (message,) = fields["messages"]
        parts = message["content"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        (image,) = (part["image_url"] for part in parts if part["type"] == "image_url")
        model, url, detail = str(fields["model"]), image["url"], image.get("detail", "auto")
        limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"expected one message with text and one image: {error!r}") from error
    if detail not in ("low", "high", "auto") or not (limit is None or _is_count(limit)):
        raise BadRequest(f"bad detail {detail!r} or max_tokens {limit!r}")
    jpeg, text = _jpeg(url), "\n".join(texts)
    return Ask(
        model=model,
        image_sha=hashlib.sha256(jpeg).hexdigest(),
        prompt_sha=hashlib.sha256(text.encode()).hexdigest(),
        prompt_tokens=len(text.split()) + image_tokens(*_size(jpeg), detail),
        max_tokens=limit,
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _jpeg(url: str) -> bytes:
    header, found, payload = url.partition("base64,")
    if header != "data:image/jpeg;" or not found:
        raise BadRequest(f"an image must come as a data:image/jpeg;base64, URI, not {url[:40]!r}")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise BadRequest(f"the image is not valid base64: {error}") from error


def _size(jpeg: bytes) -> tuple[int, int]:
    """Read width and height from the header."""
    try:
        return Image.open(io.BytesIO(jpeg), formats=("JPEG",)).size
    except UnidentifiedImageError as error:
        raise BadRequest(f"the image cannot be decoded: {error}") from error
