# SPDX-License-Identifier: Apache-2.0
"""POST /v1/captions: images in, captions out, as JSON or as an upload of files.

    curl -H "Authorization: Bearer $KEY" -F image=@cat.jpg -F image=@dog.png .../v1/captions

Each image becomes one chat request with the model's own instruction, and goes the same way.
"""

import base64
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serve.answer import Piece
from serve.protocol import (
    ChatRequest,
    ImagePart,
    ImageUrl,
    Message,
    TextPart,
    as_list,
    bad_request,
    check_size,
    describe,
    usage,
)
from serve.request import ChatModel, Job
from sg4v_ray.captions.quality import QualityConfig, judge

MULTIPART: Final = "multipart/form-data"
_FILES: Final = ("image", "images", "image[]", "images[]")
_NUMBERS: Final = {"max_tokens": int, "seed": int, "temperature": float, "top_p": float}
_LONGEST_FIELD: Final = 64 * 1024
_QUALITY: Final = QualityConfig()


class CaptionRequest(BaseModel):
    """The body of POST /v1/captions."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    images: Annotated[list[str], BeforeValidator(as_list)] = Field(min_length=1, repr=False)
    """`data:` URIs, or addresses on hosts that the server allows."""
    model: str | None = Field(default=None, max_length=256)
    """Default: the model that has an instruction of its own."""
    instruction: str | None = Field(default=None, min_length=1)
    """Default: the model's own, on which it was trained."""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)


def parse_json(data: bytes) -> CaptionRequest:
    """Read a JSON body.

    Raises:
        ApiError: 400, it is none.
    """
    check_size(data)
    try:
        return CaptionRequest.model_validate_json(data)
    except ValidationError as error:
        raise describe(error) from None


async def read_form(
    data: bytes, content_type: str, *, max_images: int
) -> tuple[list[bytes], dict[str, str]]:
    """Take an uploaded form apart: files `image`, fields as in JSON.

    Args:
        data: the body, whose size was limited when it was read.
        content_type: with the boundary.
        max_images: files beyond it end the parsing.

    Raises:
        ApiError: 400, it is no form, or a file has another name.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    # Of what the client says, only where the parts end: its charset may be one that raises.
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"").decode("latin-1")
    if not boundary:
        raise bad_request("the form cannot be read: it has no boundary")
    headers = Headers({"content-type": f'{MULTIPART}; boundary="{boundary}"'})
    parser = MultiPartParser(
        headers, stream(), max_files=max_images, max_fields=16, max_part_size=_LONGEST_FIELD
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad_request(f"the form cannot be read: {error.message}") from None
    files: list[bytes] = []
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in _FILES:
                raise bad_request(f"{name}: files are sent as `image`", param="image")
            files.append(await value.read())
        else:
            fields[name] = value
    await form.close()
    return files, fields


def parse_form(files: Sequence[bytes], fields: Mapping[str, str]) -> CaptionRequest:
    """Return what a form asks.

    Raises:
        ApiError: 400, a field is wrong.
    """
    images = [f"data:;base64,{base64.b64encode(one).decode()}" for one in files]
    values = {name: _number(name, value) for name, value in fields.items()}
    try:
        return CaptionRequest.model_validate({**values, "images": images})
    except ValidationError as error:
        raise describe(error) from None


def _number(name: str, value: str) -> Any:
    if name not in _NUMBERS:
        return value
    try:
        return _NUMBERS[name](value)
    except ValueError:
        raise bad_request(f"{name}: this is no number", param=name) from None


def pick(asked: str | None, instructions: Mapping[str, str | None]) -> str:
    """Return the id of the model to ask.

    Args:
        asked: what the request says.
        instructions: what each model is asked about an image without words.

    Raises:
        ApiError: 400, the request must name one.
    """
    if asked is not None:
        return asked
    able = [name for name, text in instructions.items() if text is not None]
    if len(able) != 1:
        known = ", ".join(instructions)
        raise bad_request(f"model: name one of {known}", param="model")
    return able[0]


def chats(body: CaptionRequest, model_id: str) -> list[ChatRequest]:
    """Return one chat request for each image."""
    return [_chat(body, model_id, url) for url in body.images]


def _chat(body: CaptionRequest, model_id: str, url: str) -> ChatRequest:
    parts: list[Any] = [ImagePart(type="image_url", image_url=ImageUrl(url=url))]
    if body.instruction is not None:
        parts.append(TextPart(type="text", text=body.instruction))
    return ChatRequest(
        model=model_id,
        messages=[Message(role="user", content=parts)],
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
    )


def answer_of(
    head: Mapping[str, Any],
    jobs: Sequence[Job],
    pieces: Sequence[Piece],
    *,
    body: CaptionRequest,
    model: ChatModel,
) -> dict[str, Any]:
    """Return what the client gets: a caption for each image, in the order they were sent."""
    instruction = body.instruction or model.config.instruction or ""
    data = [
        {
            "index": index,
            "caption": piece.text,
            "finish_reason": piece.finish_reason,
            "flags": _flags(piece, instruction),
            "tokens": piece.num_tokens,
        }
        for index, piece in enumerate(pieces)
    ]
    prompt, made = sum(one.num_prompt_tokens for one in jobs), sum(one.num_tokens for one in pieces)
    return {**head, "object": "list", "data": data, "usage": usage(prompt, made)}


def _flags(piece: Piece, instruction: str) -> list[str]:
    """Return why a batch job would not keep a caption: the same words (`core.rejects`)."""
    flags = ["cut_off"] if piece.finish_reason == "length" else []
    found = judge(piece.text, instruction=instruction, config=_QUALITY)
    return flags if found is None else [*flags, found.reason.value]
