# SPDX-License-Identifier: Apache-2.0
"""The wire: what OpenAI's chat completions look like, as far as these models can honour it.

A field that would change the answer and that we do not have is refused by name. Fields that are
known to change nothing here are ignored. Anything else is an error, as it is at OpenAI.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sg4v_ray.core.errors import Sg4vError

_IGNORED: Final = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls",
    }
)  # fmt: skip
"""Fields that change nothing here, whatever they say."""

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that we do not have, with the values that ask for nothing."""


def neutral_fields() -> dict[str, Any]:
    """Return the JSON schema of each field that we ignore, or that may only ask for nothing."""
    ignored: dict[str, Any] = {name: {} for name in sorted(_IGNORED)}
    return ignored | {name: {"enum": [*allowed, None]} for name, allowed in _NEUTRAL.items()}


_MOST_VALUES: Final = 100_000
"""Of a body's lists, objects and fields: in memory each takes tens of times what it takes here."""


class ApiError(Sg4vError):
    """A request that is answered with an error; its text goes to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def about(self, param: str) -> "ApiError":
        """Return the same error of another field."""
        return ApiError(
            self.status,
            f"{param}: {self.message}",
            param=param,
            code=self.code,
            retry_after_s=self.retry_after_s,
        )

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """An image of a message. `detail` changes nothing: the models see one size."""

    url: str = Field(repr=False)
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_list(value: Any) -> Any:
    """Return a list of a text that stands alone, as several fields allow."""
    return [value] if isinstance(value, str) else value


class Message(BaseModel):
    """One message. Clients send back what they got, so empty fields of answers are allowed.

    `name` changes nothing: the templates have no place for it.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]


class StreamOptions(_Strict):
    """What a stream contains. `include_obfuscation` changes nothing: we add none."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    model: str = Field(max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]] | None, BeforeValidator(as_list)
    ] = Field(default=None, max_length=4)
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def parse(data: bytes) -> ChatRequest:
    """Read a request body.

    Raises:
        ApiError: it is not JSON, misses a field, or asks for what we do not have.
    """
    check_size(data)
    try:
        body = ChatRequest.model_validate_json(data)
    except ValidationError as error:
        raise describe(error) from None
    for name, value in (body.model_extra or {}).items():
        _check_extra(name, value)
    for i, message in enumerate(body.messages):
        for name, value in (message.model_extra or {}).items():
            if name != "name" and value not in (None, [], {}):
                param = f"messages.{i}.{name}"
                raise bad_request(f"Unsupported field: {param}", param=param)
    for part in (body, *body.messages):
        (part.model_extra or {}).clear()  # checked, and of no use to anybody
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", param="stream_options")
    return body


def check_size(data: bytes) -> None:
    """Refuse a body that is small and would be large once it is parsed.

    Raises:
        ApiError: 400, it has too many values.
    """
    if sum(data.count(one) for one in b"[{,") > _MOST_VALUES:
        raise bad_request(f"body: more than {_MOST_VALUES:,} values or commas")


def _check_extra(name: str, value: Any) -> None:
    if value is None or name in _IGNORED:
        return
    if name not in _NEUTRAL:
        raise bad_request(
            f"Unrecognized request argument: {name}", param=name, code="unknown_parameter"
        )
    # True == 1 in Python, but not on the wire.
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool)
               for one in _NEUTRAL[name]):  # fmt: skip
        allowed = " or ".join(json.dumps(one) for one in _NEUTRAL[name]) or "nothing"
        raise bad_request(
            f"Unsupported value of {name}: this server takes {allowed} here",
            param=name,
            code="unsupported_value",
        )


def describe(error: ValidationError) -> ApiError:
    """Name the first thing that is wrong, without repeating what was sent."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = list(first["loc"])
    if place[:1] == ["messages"] and place[2:3] == ["content"] and len(place) > 4:
        del place[4]  # which kind of part it was taken for; no field of the request
    param = ".".join(str(one) for one in place) or None
    return bad_request(f"{param or 'body'}: {first['msg']}", param=param)


def model_card(model_id: str, *, created: int, max_model_len: int) -> dict[str, Any]:
    """Return one entry of the list of models. `max_model_len` is named as vLLM names it."""
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "sg4v-ray",
        "max_model_len": max_model_len,
    }


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    """Return the usage of a request; images count as the tokens they take."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def completion(
    head: dict[str, Any], said: Sequence[tuple[str, str | None]], *, used: dict[str, int]
) -> dict[str, Any]:
    """Return a whole answer.

    Args:
        head: id, created, model and system_fingerprint.
        said: the text of each choice and why it ended.
        used: see `usage`.
    """
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "message": {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": [],
            },
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        for index, (text, finish_reason) in enumerate(said)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": used}


def chunk(
    head: dict[str, Any],
    delta: dict[str, str],
    *,
    index: int = 0,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    """Return one piece of a streamed answer."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


def event(value: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE: Final = "data: [DONE]\n\n"
