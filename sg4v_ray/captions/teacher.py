# SPDX-License-Identifier: Apache-2.0
"""A strong teacher behind any OpenAI-compatible endpoint: one request in, one typed outcome out.

The SDK's own retries are off: a request that is sent again may be paid again, so who sends it
(`captions.desk`) has to know. Every text that comes from outside is cleared of the key first.
"""

import asyncio
import base64
import email.utils
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from sg4v_ray.core.config import fingerprint
from sg4v_ray.core.errors import ConfigError, TeacherUnusable
from sg4v_ray.core.identity import identity_form, identity_keys
from sg4v_ray.core.price import Detail, PriceTable
from sg4v_ray.core.rate import Limits
from sg4v_ray.core.rejects import Reject

_NEVER_SENT: Final = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.LocalProtocolError,
    httpx2.UnsupportedProtocol,
    httpx2.ProxyError,
)
_BUSY: Final = {408, 409, 425, 429, 503, 529}
"""Answers that cost nothing and blame no image. 529: "overloaded", as some have it."""
_PERHAPS_PAID: Final = {502, 504}
"""A gateway lost its patience or its backend; what the backend had done by then is charged."""
_ROW_AT_FAULT: Final = {400, 403, 413, 415, 422}
"""Some say 403 for one moderated image. When no image is answered, it was not the image's fault."""
NO_MONEY: Final = "insufficient_quota"
"""What a 429 says of an account that is empty: waiting does not help."""
_LONGEST_DETAIL: Final = 2000
"""Characters that are kept of what a provider says of an error."""


@identity_keys(
    "ImageSent", format="format", max_side="max_side", quality="quality", detail="detail"
)
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSent:
    """How an image is sent."""

    format: Literal["jpeg", "png"] = "jpeg"
    max_side: int = 2048
    """Images are scaled down to this longest side in pixels."""
    quality: int = 90
    """Of JPEG, 1 to 95."""
    detail: Detail = "high"
    """What the provider is asked to look at: `low` is one small view, for a fixed price."""

    def __post_init__(self) -> None:
        if self.max_side < 1 or not 1 <= self.quality <= 95:
            raise ConfigError(
                f"max_side must be at least 1 and quality 1 to 95, got {self.max_side} and "
                f"{self.quality}"
            )


@identity_keys(
    "TeacherConfig",
    model="model",
    max_tokens="max_tokens",
    temperature="temperature",
    image="image",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Which teacher is asked, and how. Part of identity."""

    model: str
    max_tokens: int = 1024
    temperature: float = 0.0
    image: ImageSent = ImageSent()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where the teacher is reached, and what it may cost. Placement: not part of identity."""

    base_url: str
    """E.g. https://api.openai.com/v1."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key, in the environment in which Ray was started on the
    driver's node; None for a teacher without keys. Never give a key as a flag or in a runtime_env:
    both are shown to whoever sees the job."""
    timeout_s: float = 120.0
    """For one whole request."""
    limits: Limits = Limits()
    prices: PriceTable = PriceTable(input_usd_per_mtok=0.0, output_usd_per_mtok=0.0)
    """Prices of the model. The recipe's are of the day that it names: check them."""
    max_usd: float | None = None
    """Hard cap of all runs of this collection together: no request goes out that could pass it."""
    plain_http: bool = False
    """Allow http:// to another machine: whoever is on the way there can read the key."""
    max_tries: int = 8
    """How often an image is sent whose answers get lost or fail. While others are answered it is
    then a reject (`no_answer`); when none is, the job ends and can be run again."""

    def __post_init__(self) -> None:
        if self.api_key_env and not self.plain_http and not _keeps_secrets(self.base_url):
            raise ConfigError(
                f"base_url {self.base_url!r} is not https, so the key could be read on the way. "
                "Write https://, or --endpoint.api-key-env None for a teacher without keys, or "
                "--endpoint.plain-http in a network that is yours alone"
            )
        if self.max_tries < 1:
            raise ConfigError(f"max_tries must be at least 1, got {self.max_tries}")
        if self.max_usd is not None and self.prices.usd(10**6, 10**6) == 0:
            raise ConfigError(
                f"max_usd is {self.max_usd:g}, but the prices are 0, so nothing would ever be "
                "counted; give --endpoint.prices.input-usd-per-mtok and .output-usd-per-mtok"
            )
        if self.max_usd is not None and self.max_usd <= 0:
            raise ConfigError(f"max_usd must be above 0, got {self.max_usd:g}")

    def key(self) -> str:
        """Return the key.

        Raises:
            ConfigError: the variable is not set.
        """
        if self.api_key_env is None:
            return "no-key"
        value = os.environ.get(self.api_key_env, "").strip()
        if not value:
            raise ConfigError(
                f"the environment variable {self.api_key_env} is not set where Ray was started; "
                "export the teacher's API key under that name before `ray start` on the driver's "
                "node, or name another variable with --endpoint.api-key-env"
            )
        if not (value.isascii() and value.isprintable() and " " not in value):
            raise ConfigError(
                f"the key in {self.api_key_env} has characters that no key has, such as quotes of "
                "a word processor or a line feed inside; copy it anew"
            )
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What came back for a request that the teacher took. Exactly one of text and reject is set."""

    text: str | None
    reject: str | None
    detail: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    usage_is_sound: bool
    """False where the counts are missing or cannot be: then the most is charged."""


def _keeps_secrets(url: str) -> bool:
    """Say whether a URL is https or of this machine."""
    place = urlsplit(url)
    return place.scheme == "https" or place.hostname in ("127.0.0.1", "::1", "localhost")


class TurnedAway(Exception):
    """The request was not taken and costs nothing; later it may be."""

    def __init__(
        self, why: str, retry_after_s: float | None = None, *, is_busy: bool = True
    ) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.is_busy = is_busy
        """False for a failure that this image may be to blame for."""


class AnswerLost(Exception):
    """The request went out and no answer came back whole; it may have been paid for."""


def answer_key(
    config: TeacherConfig, *, prompt_sha256: str, image_sha256: str, attempt: int
) -> str:
    """Return the ledger key under which a new answer is stored; see `answer_keys`."""
    return answer_keys(
        config, prompt_sha256=prompt_sha256, image_sha256=image_sha256, attempt=attempt
    )[0]


def answer_keys(
    config: TeacherConfig, *, prompt_sha256: str, image_sha256: str, attempt: int
) -> tuple[str, ...]:
    """Return the ledger keys of an answer: the present one, then those of earlier releases.

    A key is a hash of model, parameters, prompt and image.

    Args:
        attempt: 1, or the number of a retry of rejects, which needs another answer.
    """
    asked = {"prompt": prompt_sha256, "image": image_sha256}
    again = {"attempt": attempt} if attempt > 1 else {}
    return tuple(fingerprint({"config": one, **asked, **again}) for one in _forms(config))


def asked_key(config: TeacherConfig, prompt_sha256: str) -> str:
    """Return the key that is noted of a question; see `asked_keys`."""
    return asked_keys(config, prompt_sha256)[0]


def asked_keys(config: TeacherConfig, prompt_sha256: str) -> tuple[str, ...]:
    """Return the keys of a question: the present one, then those of earlier releases.

    A key is a hash of model, parameters and prompt.
    """
    return tuple(fingerprint({"config": one, "prompt": prompt_sha256}) for one in _forms(config))


def _forms(config: TeacherConfig) -> list[dict[str, Any]]:
    """Return the forms in which a config is hashed: the present one, then those of releases.

    Version 0.1.0 hashed the fields below, defaults included, without class names. A config with
    another value in a later field has no form of 0.1.0.
    """
    image = config.image
    sent = {
        "format": image.format,
        "max_side": image.max_side,
        "quality": image.quality,
        "detail": image.detail,
    }
    released = {
        "model": config.model,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "image": sent,
    }
    form = identity_form(config)
    later = (form.keys() - released.keys()) | (form.get("image", {}).keys() - sent.keys())
    return [form] if later - {"type"} else [form, released]


def body_of(config: TeacherConfig, prompt: str, image: bytes) -> dict[str, Any]:
    """Return the JSON body of a chat completion request, for sending now or in a batch."""
    url = f"data:image/{config.image.format};base64,{base64.b64encode(image).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url, "detail": config.image.detail}}
    return {
        "model": config.model,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}, picture]}],
    }


class Teacher:
    """One client; for one event loop."""

    def __init__(self, config: TeacherConfig, endpoint: Endpoint, *, key: str) -> None:
        self.config, self._endpoint, self._key = config, endpoint, key
        self.client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=key,
            timeout=httpx2.Timeout(endpoint.timeout_s, connect=10.0),
            max_retries=0,
        )

    async def ask(self, prompt: str, image: bytes, *, ticket: str) -> Reply:
        """Send one request.

        Args:
            ticket: goes along as X-Client-Request-Id, so that a provider's log can be compared.

        Raises:
            TurnedAway: it was not taken; nothing is charged.
            AnswerLost: no answer, or not a whole one; it may be charged.
            TeacherUnusable: the key, the model or the URL is wrong, or the money is gone.
        """
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                raw = await self.client.chat.completions.with_raw_response.create(
                    **body_of(self.config, prompt, image),
                    extra_headers={"X-Client-Request-Id": ticket},
                )
        except TimeoutError:
            raise AnswerLost(f"no answer in {self._endpoint.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            # Its name alone: some of these quote the headers, and so the key, as Python writes it.
            why = f"{type(error.__cause__ or error).__name__} at {self._endpoint.base_url}"
            if isinstance(error.__cause__, _NEVER_SENT):
                raise TurnedAway(why) from None
            raise AnswerLost(why) from None
        except openai.APIStatusError as error:
            return self.status_error(error.status_code, error.response.headers, error.response.text)
        return self.reply(raw.http_response.content)

    def status_error(self, status: int, headers: Mapping[str, str], body: str) -> Reply:
        """Turn an HTTP error into a reply, where the image is to blame, or raise as `ask` does."""
        said = self.clean(f"HTTP {status}: {body}")
        if status in _ROW_AT_FAULT:
            return _rejected(Reject.BAD_REQUEST, said, 0, 0, sound=True)
        if status in _PERHAPS_PAID:
            raise AnswerLost(said)
        if (status in _BUSY or status >= 500) and not (status == 429 and NO_MONEY in body):
            raise TurnedAway(said, retry_after_s(headers), is_busy=status in _BUSY)
        raise TeacherUnusable(
            f"{self._endpoint.base_url} answered {said}. Check the key, the account, the model "
            "name and --endpoint.base-url"
        )

    def reply(self, body: bytes | str) -> Reply:
        """Read a completion's JSON.

        Raises:
            AnswerLost: it is no completion.
        """
        try:
            return outcome(_Completion.model_validate_json(body), self.config.max_tokens)
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]
            raise AnswerLost(self.clean(f"no chat completion: {problem['msg']}")) from None

    def clean(self, text: str) -> str:
        """Return a text from outside without the key, and not too long."""
        return text.replace(self._key, "[API key]")[:_LONGEST_DETAIL]

    async def close(self) -> None:
        """Close the client's connections."""
        await self.client.close()


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return how long a provider says to wait, or None.

    Source:
        RFC 9110, section 10.2.3: seconds or a date. `retry-after-ms` is OpenAI's and Azure's.
    """
    found = {key.lower(): value for key, value in headers.items()}
    milliseconds = _number(found.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    text = found.get("retry-after", "")
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """What is read of a chat completion; other servers than OpenAI's leave out the rest."""

    choices: list[_Choice]
    usage: Any = None


def outcome(reply: _Completion, max_tokens: int) -> Reply:
    """Turn a teacher's completion into a typed reply."""
    if not reply.choices:
        asked, size, sound = usage_of(reply.usage, "", max_tokens)
        return _rejected(Reject.EMPTY_TEXT, "an answer without a choice", asked, size, sound=sound)
    choice = reply.choices[0]
    text = (choice.message.content or "").strip()
    prompt_tokens, size, sound = usage_of(reply.usage, text, max_tokens)
    if choice.message.refusal:
        return _rejected(Reject.REFUSED, choice.message.refusal, prompt_tokens, size, sound=sound)
    if choice.finish_reason == "content_filter":
        return _rejected(Reject.CONTENT_FILTER, text, prompt_tokens, size, sound=sound)
    if choice.finish_reason == "length":
        detail = f"after {size} tokens: {text}"
        return _rejected(Reject.CUT_OFF, detail, prompt_tokens, size, sound=sound, reason="length")
    if not text:
        why = "the teacher sent no text"
        return _rejected(Reject.EMPTY_TEXT, why, prompt_tokens, size, sound=sound)
    return Reply(
        text=text,
        reject=None,
        detail=None,
        finish_reason="stop",
        prompt_tokens=prompt_tokens,
        completion_tokens=size,
        usage_is_sound=sound,
    )


def usage_of(usage: Any, text: str, max_tokens: int) -> tuple[int, int, bool]:
    """Return prompt tokens, generated tokens, and whether a provider's counts can be true.

    They cannot be when one is missing, negative or no whole number, when the total is not their
    sum, when more was generated than was asked for, or fewer tokens than words.
    """
    counts = usage if isinstance(usage, dict) else {}
    asked, said = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if not (type(asked) is int and type(said) is int and asked > 0 and said >= 0):
        return 0, 0, False
    total = counts.get("total_tokens", asked + said)
    sound = total == asked + said and len(text.split()) <= said <= max_tokens
    return asked, said, sound


def _rejected(
    reject: Reject,
    detail: str,
    prompt_tokens: int,
    size: int,
    *,
    sound: bool,
    reason: str = "stop",
) -> Reply:
    return Reply(
        text=None,
        reject=reject.value,
        detail=detail,
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=size,
        usage_is_sound=sound,
    )
