# SPDX-License-Identifier: Apache-2.0
"""What the chat page asks of the server, with its user's key: models, answers, captions.

Nothing here knows of Gradio. Whatever the server refuses is a `Refused` with the server's words.
"""

import base64
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from sg4v_ray.core.errors import Sg4vError

_NO_KEY: Final = "no-key"
"""What is sent where no key was typed: the SDK wants one."""
_FIELDS: Final = re.compile(r"^((images|messages)[\w.]*: )+")
"""Where in the body something is wrong: nobody who reads a page wrote a body."""
_LONGEST_KEY: Final = 512
_CONNECT_S: Final = 10.0


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class _Made(BaseModel):
    caption: str
    tokens: int
    flags: tuple[str, ...]


class _Captions(BaseModel):
    data: list[_Made]


class Refused(Sg4vError):
    """The server said no, or nothing; the text is for the person who asked."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.retry_after_s = retry_after_s

    def words(self) -> str:
        """Return what is shown."""
        kind = "" if self.status is None else f"{self.status}: "
        wait = self.retry_after_s
        later = "" if wait is None or "try again in" in self.message else f" (in {wait:g} s)"
        return f"{kind}{_FIELDS.sub('', self.message)}{later}"


@dataclass(slots=True)
class Exchange:
    """A question, perhaps about an image, and what was answered."""

    question: str
    image: bytes | None = None
    answer: str = ""
    """Empty while there is none, or when it was stopped before its first word."""


def messages(exchanges: Sequence[Exchange]) -> list[Any]:
    """Return a conversation as the API takes it: users and assistant in turn.

    A question that was not answered becomes a part of the next one, its image too.
    """
    found: list[Any] = []
    asked: list[Any] = []
    for one in exchanges:
        if one.image is not None:
            asked.append({"type": "image_url", "image_url": {"url": _uri(one.image)}})
        if one.question:
            asked.append({"type": "text", "text": one.question})
        if one.answer:
            found.append({"role": "user", "content": asked})
            found.append({"role": "assistant", "content": one.answer})
            asked = []
    return [*found, {"role": "user", "content": asked}] if asked else found


@dataclass(frozen=True, slots=True)
class Spoken:
    """A piece of an answer. The last one has the count of its tokens."""

    text: str
    num_tokens: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """What the server said of an image."""

    text: str
    num_tokens: int
    flags: tuple[str, ...]


class ApiClient:
    """The server's HTTP API. One object serves all users; a key is an argument of each call."""

    def __init__(self, address: str, *, timeout_s: float, transport: Any = None) -> None:
        """Open nothing yet.

        Args:
            address: of the server, without /v1.
            timeout_s: for the next byte of an answer.
            transport: of the HTTP client, in tests.
        """
        self._address = address.rstrip("/")
        # The environment's proxies are not for keys; redirects could lead them elsewhere.
        http = httpx2.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            transport=transport,
            # The page's queue limits what is asked at once; who connects should not wait in ours.
            limits=httpx2.Limits(max_connections=None),
        )
        self._client = openai.AsyncOpenAI(
            base_url=f"{self._address}/v1",
            api_key=_NO_KEY,
            http_client=http,
            max_retries=0,
            timeout=httpx2.Timeout(timeout_s, connect=_CONNECT_S),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def models(self, key: str) -> list[str]:
        """Return the ids of all models.

        Raises:
            Refused: 401 above all, for a key that is none.
        """
        with self._refusals():
            response = await self._as(key).get("/models", cast_to=httpx2.Response)
            return [one.id for one in _Models.model_validate_json(response.content).data]

    async def chat(
        self, key: str, *, model: str, exchanges: Sequence[Exchange]
    ) -> AsyncGenerator[Spoken, None]:
        """Yield an answer to the last question in pieces.

        Closing this iterator ends the request on the server.

        Raises:
            Refused: before the first piece, or between two.
        """
        with self._refusals():
            stream = await self._as(key).chat.completions.create(
                model=model,
                messages=messages(exchanges),
                stream=True,
                stream_options={"include_usage": True},
            )
            async with stream:
                reason, is_whole = None, False
                async for chunk in stream:
                    if chunk.choices:
                        reason = chunk.choices[0].finish_reason or reason
                        if text := chunk.choices[0].delta.content:
                            yield Spoken(text)
                    if chunk.usage is not None:
                        is_whole = True
                        yield Spoken("", chunk.usage.completion_tokens, reason)
            if not is_whole:
                raise Refused("the server ended the answer too early")

    async def captions(
        self, key: str, images: Sequence[bytes], *, model: str | None, instruction: str | None
    ) -> list[Caption]:
        """Return a caption for each image, in one call.

        Args:
            key: of the user.
            images: as many as the server takes.
            model: None leaves the choice to the server.
            instruction: None is the model's own.

        Raises:
            Refused: the whole call; `param` names the image that is to blame, if one is.
        """
        body: dict[str, Any] = {"images": [_uri(one) for one in images]}
        body |= {"model": model} if model else {}
        body |= {"instruction": instruction} if instruction else {}
        with self._refusals():
            response = await self._as(key).post("/captions", cast_to=httpx2.Response, body=body)
            made = _Captions.model_validate_json(response.content).data
        return [Caption(one.caption, one.tokens, one.flags) for one in made]

    def _as(self, key: str) -> openai.AsyncOpenAI:
        key = key.strip()
        is_clean = key.isascii() and key.isprintable() and " " not in key
        if key and not (is_clean and len(key) <= _LONGEST_KEY):
            raise Refused("this is no API key; it has characters that no key has")
        return self._client.with_options(api_key=key or _NO_KEY)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            raise _refused(error) from None
        except openai.APITimeoutError:
            raise Refused("the server did not answer in time") from None
        except (openai.APIConnectionError, httpx2.TransportError):
            raise Refused(f"the server at {self._address} cannot be reached, or hung up") from None
        except ValidationError:
            raise Refused(f"what answers at {self._address} is not the server") from None
        except openai.APIError as error:  # an event of a stream that had begun
            raise Refused(error.message) from None


def _refused(error: openai.APIStatusError) -> Refused:
    body = error.body if isinstance(error.body, dict) else {}
    message, param = body.get("message"), body.get("param")
    waits = error.response.headers.get("retry-after", "")
    return Refused(
        str(message) if message else f"the server said {error.response.reason_phrase}",
        status=error.status_code,
        param=str(param) if param else None,
        retry_after_s=float(waits) if waits.isdecimal() else None,
    )


def _uri(data: bytes) -> str:
    # The server looks at the bytes: it does not read the media type.
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
