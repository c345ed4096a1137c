# SPDX-License-Identifier: Apache-2.0
"""What is generated for a request, and the bodies that tell the client of it."""

import email.utils
import hashlib
import itertools
import math
import random
import time
from dataclasses import dataclass
from typing import Any, Final

from tests.teacher_server.config import ServerConfig
from tests.teacher_server.wire import Ask

_SYLLABLES: Final = ("ba", "co", "di", "fu", "ga", "ho", "ki", "lu", "me", "no", "pa", "ri")
_WORDS: Final = tuple("".join(w) for n in (2, 3) for w in itertools.product(_SYLLABLES, repeat=n))
_SENTENCE_WORDS: Final = 14
_REFUSAL: Final = "I'm sorry, I can't assist with that."
_FINISH: Final = {"content_filter": "content_filter", "length": "length"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What the model wrote, and what the outcome became."""

    outcome: str
    """As it was drawn, or `length` where max_tokens cut an `ok`."""
    text: str
    num_tokens: int
    finish: str = "stop"
    """The finish_reason; a text that max_tokens cut says so whatever else it lies about."""


def generate(ask: Ask, outcome: str, config: ServerConfig) -> Generated:
    """Write the answer: pseudo words that depend on image and prompt only."""
    if outcome in ("refusal", "refusal_prose"):
        return Generated(outcome=outcome, text=_REFUSAL, num_tokens=len(_REFUSAL.split()))
    digest = hashlib.sha256((ask.image_sha + ask.prompt_sha).encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    drawn = max(8, round(rng.lognormvariate(math.log(config.caption_tokens), config.caption_sigma)))
    words, finish = rng.choices(_WORDS, k=drawn), _FINISH.get(outcome, "stop")
    if outcome in _FINISH:
        words = words[: drawn // 2]
    if ask.max_tokens is not None and len(words) > ask.max_tokens:
        words, finish = words[: ask.max_tokens], "length"
        outcome = "length" if outcome == "ok" else outcome
    return Generated(outcome=outcome, text=_prose(words), num_tokens=len(words), finish=finish)


def _prose(words: list[str]) -> str:
    starts = range(0, len(words), _SENTENCE_WORDS)
    return " ".join(" ".join(words[n : n + _SENTENCE_WORDS]).capitalize() + "." for n in starts)


def completion(ask: Ask, made: Generated, answer_id: str) -> dict[str, Any]:
    """Fill the shape of a chat completion; a `usage_...` outcome lies about the tokens."""
    refused = made.outcome == "refusal"
    message = {
        "role": "assistant",
        "content": None if refused else made.text,
        "refusal": made.text if refused else None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": made.finish}
    body = {
        "id": f"chatcmpl-{answer_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [choice],
        "usage": _usage(ask.prompt_tokens, made.num_tokens, made.outcome),
    }
    if made.outcome == "usage_missing":
        del body["usage"]
    return body


def _usage(asked: int, answered: int, outcome: str) -> dict[str, int]:
    match outcome:
        case "usage_zero":
            asked, answered = 0, 0
        case "usage_negative":
            answered = -answered
        case "usage_small":
            asked, answered = asked // 3, answered // 3
    total = asked + answered + (7 if outcome == "usage_total" else 0)
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": total}


_ERROR_BODIES: Final = {
    "400": ("invalid_request_error", "image_parse_error", "Your image could not be parsed."),
    "401": ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    "429": ("requests", "rate_limit_exceeded", "Rate limit reached. Please try again."),
    "429_quota": ("insufficient_quota", "insufficient_quota", "You exceeded your current quota."),
    "500": ("server_error", None, "The server had an error while processing your request."),
    "503": ("server_error", None, "The engine is currently overloaded."),
}


class ApiError(Exception):
    """Becomes an error response; nothing of it is logged."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, "invalid_request_error", code)


def error_body(message: str, kind: str, code: str | None) -> dict[str, Any]:
    """Fill the shape of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error(outcome: str, retry_after_s: int) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return status, headers and body of an outcome that is an error."""
    status = outcome[:3]
    kind, code, message = _ERROR_BODIES.get(outcome) or _ERROR_BODIES[status]
    return int(status), _retry_headers(outcome, retry_after_s), error_body(message, kind, code)


def _retry_headers(outcome: str, retry_after_s: int) -> dict[str, str]:
    match outcome:
        case "429" | "503_retry_after":
            return {"Retry-After": str(retry_after_s)}
        case "429_date":
            when = email.utils.formatdate(time.time() + retry_after_s, usegmt=True)
            return {"Retry-After": when}
        case "429_ms":
            return {"retry-after-ms": str(retry_after_s * 1000)}
        case _:
            return {}
