# SPDX-License-Identifier: Apache-2.0
"""From a chat body to what an engine takes: the same token ids and pixels as in training.

Plain functions, CPU work only; the ingress runs them in threads so that its event loop is free.
"""

import base64
import binascii
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from serve.config import Limits
from serve.deployment import ModelDeployment
from serve.protocol import ChatRequest, ImagePart, Message, TextPart, bad_request
from sg4v_ray.core.errors import TemplateError
from sg4v_ray.core.images import FORMATS, ImageLimits, Rejected, open_image
from sg4v_ray.core.records import Turn
from sg4v_ray.core.rejects import Reject
from sg4v_ray.inference.engine import Generation, Pixels, Request
from sg4v_ray.inference.prompt import PromptRules
from sg4v_ray.model.conversation import Conversation, Encoded
from sg4v_ray.model.geometry import as_model_sees


@dataclass(frozen=True, slots=True)
class Job:
    """One request on its way to a replica."""

    request: Request
    stop: tuple[str, ...]
    """Texts that end an answer; they are not part of it."""
    num_prompt_tokens: int
    """With every image expanded to the tokens it takes."""
    sent_at: float = 0.0
    """When it was handed to a replica, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class ChatModel:
    """What is needed to make requests for a model: its files without the weights."""

    config: ModelDeployment
    conversation: Conversation
    rules: PromptRules

    @classmethod
    def open(cls, config: ModelDeployment, folder: Path) -> "ChatModel":
        """Read config.json and tokenizer.json of a model folder.

        Raises:
            ConfigError, ContractError: a file is missing or does not fit.
        """
        rules = PromptRules.read(folder, max_model_len=config.engine.max_model_len)
        return cls(config, Conversation.open(folder, config.template), rules)


def media_urls(body: ChatRequest, limits: Limits) -> list[str]:
    """Return the addresses of images that are to be fetched, where the server fetches any.

    Raises:
        ApiError: 400, there are more images than it takes.
    """
    if not limits.allowed_media_domains:
        return []
    found = _image_urls(body.messages, limits)
    return [url for _, url in found if url.partition(":")[0].lower() in ("http", "https")]


def to_request(
    body: ChatRequest,
    *,
    model: ChatModel,
    limits: Limits,
    fetched: Mapping[str, bytes | Rejected] = MappingProxyType({}),
) -> Job:
    """Turn a chat body into a job.

    Args:
        body: the request.
        model: whom it asks.
        limits: of one request.
        fetched: what was found at `media_urls`.

    Raises:
        ApiError: the messages are no conversation, an image is refused, or the prompt is too long.
    """
    if (body.n or 1) > limits.max_n:
        raise bad_request(f"n: this server gives at most {limits.max_n} answers", param="n")
    if len(body.messages) > limits.max_messages:
        raise bad_request(f"more than {limits.max_messages} messages", param="messages")
    images = [
        _pixels(_bytes_of(url, where, limits, fetched), where, model, limits.image)
        for where, url in _image_urls(body.messages, limits)
    ]
    prompt = _prompt(body.messages, num_images=len(images), model=model)
    num_prompt_tokens = len(prompt.token_ids) + len(images) * (model.rules.num_image_tokens - 1)
    how = _generation(body, model=model, num_prompt_tokens=num_prompt_tokens)
    request = Request(token_ids=prompt.token_ids, images=tuple(images), generation=how)
    return Job(request, tuple(body.stop or ()), num_prompt_tokens)


def _image_urls(messages: Sequence[Message], limits: Limits) -> list[tuple[str, str]]:
    """Return the field and the URL of every image, after counting them."""
    found = []
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content):
            if not isinstance(part, ImagePart):
                continue
            where = f"messages.{i}.content.{j}.image_url.url"
            if message.role != "user":
                raise bad_request(f"{where}: only user messages may have images", param=where)
            found.append((where, part.image_url.url))
    if len(found) > limits.max_images:
        raise bad_request(
            f"{len(found)} images; this server takes at most {limits.max_images} a request",
            param="messages",
        )
    return found


def _bytes_of(
    url: str, where: str, limits: Limits, fetched: Mapping[str, bytes | Rejected]
) -> bytes:
    found = fetched.get(url)
    if found is None:
        return _decode_uri(url, where, limits)
    if isinstance(found, Rejected):
        # Nothing of what was met inside the network: neither addresses nor answers.
        text = _NOT_FETCHED.get(found.reason, "the image could not be fetched")
        raise bad_request(f"{where}: {text}", param=where, code="invalid_image_url")
    return found


def _pixels(data: bytes, where: str, model: ChatModel, limits: ImageLimits) -> Pixels:
    image = open_image(data, limits)
    if isinstance(image, Rejected):
        # The detail holds the decoder's own words, which are not for strangers.
        text = _REFUSED.get(image.reason, "the image is broken").format(
            max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, formats=", ".join(FORMATS)
        )
        raise bad_request(f"{where}: {text}", param=where, code=image.reason.value)
    return as_model_sees(image, model.rules.image_size, model.config.geometry)


_MAX_CHARACTERS_A_TOKEN: Final = 32
"""Above the longest token of Llama's vocabulary (16 spaces): what is refused by it could not fit,
and is refused before it is tokenised."""
_NOT_FETCHED = {
    Reject.HOST_NOT_ALLOWED: "this server fetches no image from there",
    Reject.TOO_MANY_BYTES: "the image has more bytes than this server takes",
    Reject.TIMED_OUT: "the image did not come in time",
}
_REFUSED = {
    Reject.EMPTY_FILE: "the image has 0 bytes",
    Reject.NOT_AN_IMAGE: "this is not an image; send {formats}",
    Reject.FORMAT_NOT_ALLOWED: "this image format is not accepted; send {formats}",
    Reject.TOO_MANY_BYTES: "the image has more than {max_bytes} bytes",
    Reject.TOO_MANY_PIXELS: "the image has more than {max_pixels} pixels",
    Reject.TRUNCATED: "the image is cut off",
}


def _decode_uri(url: str, where: str, allowed: Limits) -> bytes:
    """Return the bytes of a data: URI; its media type is not trusted, so it is not read."""
    limits = allowed.image
    head, comma, data = url.partition(",")
    scheme, _, rest = head.partition(":")
    if scheme.lower() != "data" or not comma or rest.split(";")[-1].strip().lower() != "base64":
        also = "or from allowed hosts" if allowed.allowed_media_domains else "only"
        raise bad_request(
            f"{where}: images are accepted as data: URIs {also} (data:image/png;base64,...)",
            param=where,
            code="invalid_image_url",
        )
    if len(data) > (limits.max_bytes + 2) // 3 * 4:
        text = _REFUSED[Reject.TOO_MANY_BYTES].format(max_bytes=limits.max_bytes)
        raise bad_request(f"{where}: {text}", param=where, code=Reject.TOO_MANY_BYTES.value)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise bad_request(
            f"{where}: this is not base64", param=where, code="invalid_base64"
        ) from None


def _prompt(messages: Sequence[Message], *, num_images: int, model: ChatModel) -> Encoded:
    """Encode the messages; texts of one message are joined by a newline, as in `chat_template`."""
    system = None
    if messages[0].role in ("system", "developer"):
        system, messages = _text(messages[0]), messages[1:]
    num_characters = len(system or "") + sum(len(_text(one)) for one in messages)
    if num_characters > _MAX_CHARACTERS_A_TOKEN * model.rules.max_len:
        raise bad_request(
            f"{num_characters} characters are more than this model's context of "
            f"{model.rules.max_len} tokens can hold",
            param="messages",
            code="context_length_exceeded",
        )
    try:
        turns = list(_turns(messages, model.config.instruction))
        return model.conversation.prompt(turns, num_images=num_images, system=system)
    except TemplateError as error:
        raise bad_request(f"messages: {error}", param="messages") from None


def _turns(messages: Sequence[Message], instruction: str | None) -> Iterator[Turn]:
    for i, message in enumerate(messages):
        if message.role in ("system", "developer"):
            raise bad_request(
                "messages: only the first message may be of the system", param="messages"
            )
        text = _text(message)
        if not text.strip() and message.role == "user":
            if instruction is None or not message.content:
                raise bad_request(
                    f"message {i} of the conversation has no text; ask something", param="messages"
                )
            text = instruction
        yield Turn(role=message.role, text=text)


def _text(message: Message) -> str:
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _generation(body: ChatRequest, *, model: ChatModel, num_prompt_tokens: int) -> Generation:
    default = model.config.generation
    room = model.rules.max_len - num_prompt_tokens
    asked = _asked_tokens(body)
    if room < (asked or 1):
        raise bad_request(
            f"this model's context holds {model.rules.max_len} tokens; the prompt has "
            f"{num_prompt_tokens} with its images and {asked or 1} more were asked for",
            param="messages",
            code="context_length_exceeded",
        )
    temperature = default.temperature if body.temperature is None else body.temperature
    seed = body.seed
    if seed is None:  # two people who sample the same prompt expect two answers
        seed = secrets.randbits(63) if temperature > 0 else default.seed
    return Generation(
        max_tokens=asked or min(default.max_tokens, room),
        temperature=temperature,
        top_p=default.top_p if body.top_p is None else body.top_p,
        repetition_penalty=default.repetition_penalty,
        seed=seed % 2**63,
    )


def _asked_tokens(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_request(
            "max_tokens and max_completion_tokens disagree; send one", param="max_tokens"
        )
    return new if new is not None else old
