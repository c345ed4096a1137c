# SPDX-License-Identifier: Apache-2.0
"""A strong teacher behind any OpenAI-compatible endpoint, with typed outcomes.

The SDK's own retries are off: ours are counted, and only for errors that may pass.
"""

import base64
import os
from dataclasses import dataclass

import openai
from openai.types.chat import ChatCompletion

from sg4v_ray.batch.generate import Answer
from sg4v_ray.core.errors import ConfigError, TeacherBusy, TeacherUnusable
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.retry import RetryPolicy, retrying


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Which teacher is asked, and how. Part of identity."""

    model: str
    prompt: str
    """Name of a prompt in `captions.prompts`."""
    max_tokens: int = 1024
    temperature: float = 0.0
    max_side: int = 2048
    """Images are scaled down to this longest side in pixels before they are sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where the teacher is reached. Placement: not part of identity."""

    base_url: str
    """E.g. https://api.openai.com/v1."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable, on the nodes, that holds the key; None for a teacher without keys."""
    timeout_s: float = 120.0
    max_in_flight: int = 32
    """Requests that one actor keeps open at once."""
    retry: RetryPolicy = RetryPolicy()

    def key(self) -> str:
        """Return the key.

        Raises:
            ConfigError: the variable is not set.
        """
        if self.api_key_env is None:
            return "no-key"
        value = os.environ.get(self.api_key_env, "")
        if not value:
            raise ConfigError(
                f"the environment variable {self.api_key_env} is not set; export the teacher's "
                "API key under that name, or name another with --endpoint.api-key-env"
            )
        return value


class Teacher:
    """One client; call `caption` from one event loop."""

    def __init__(self, config: TeacherConfig, endpoint: Endpoint, *, key: str, prompt: str) -> None:
        self._config, self._endpoint, self._prompt = config, endpoint, prompt
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=key, timeout=endpoint.timeout_s, max_retries=0
        )

    async def caption(self, png: bytes) -> Answer:
        """Ask for one caption; a refusal is an answer with a reject reason.

        Raises:
            TeacherBusy: it stayed busy through all tries; the job resumes where it stopped.
            TeacherUnusable: the key, the model or the URL is wrong.
        """
        return await retrying(
            lambda: self._ask(png), on=(TeacherBusy,), policy=self._endpoint.retry
        )

    async def _ask(self, png: bytes) -> Answer:
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        try:
            reply = await self._client.chat.completions.create(
                model=self._config.model,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": self._prompt},
                            {"type": "image_url", "image_url": {"url": url}},
                        ],
                    }
                ],
            )
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as no:
            raise TeacherBusy(f"{self._endpoint.base_url}: {no}") from no
        except (openai.BadRequestError, openai.UnprocessableEntityError) as no:
            return Answer(None, 0, None, Reject.BAD_REQUEST.value, str(no))
        except openai.APIStatusError as no:
            raise TeacherUnusable(
                f"{self._endpoint.base_url} answered {no.status_code}: {no.message}. Check the "
                "key, the model name and --endpoint.base-url."
            ) from no
        return outcome(reply)

    async def close(self) -> None:
        """Close the client's connections."""
        await self._client.close()


def outcome(reply: ChatCompletion) -> Answer:
    """Turn a teacher's reply into a row's outcome."""
    choice = reply.choices[0]
    size = reply.usage.completion_tokens if reply.usage else 0
    text = (choice.message.content or "").strip()
    if choice.message.refusal:
        return Answer(None, size, "stop", Reject.REFUSED.value, choice.message.refusal)
    if choice.finish_reason == "content_filter":
        return Answer(None, size, "stop", Reject.CONTENT_FILTER.value, text)
    if choice.finish_reason == "length":
        return Answer(None, size, "length", Reject.CUT_OFF.value, f"after {size} tokens: {text}")
    if not text:
        return Answer(None, size, "stop", Reject.EMPTY_TEXT.value, "the teacher sent no text")
    return Answer(text, size, "stop", None, None)
