# SPDX-License-Identifier: Apache-2.0
"""openai for Python, configured by OPENAI_BASE_URL and OPENAI_API_KEY."""

from typing import Any

import openai
from openai.types.chat import ChatCompletionMessage
from steps import NO_IMAGE, NO_MODEL, WRONG_KEY, Task, done, raises, task


def look(uri: str, text: str = "What is this?") -> dict[str, Any]:
    """Return a message with an image."""
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": uri}}]
    return {"role": "user", "content": parts}


def models(client: openai.OpenAI, it: Task) -> None:
    assert it.model in [one.id for one in client.models.list()], "the model is not listed"
    found = client.models.retrieve(it.model)
    assert (found.id, found.object) == (it.model, "model"), found
    with raises(openai.NotFoundError):
        client.models.retrieve(NO_MODEL)
    done("models")


def image(client: openai.OpenAI, it: Task) -> ChatCompletionMessage:
    """Ask about the image, return the answer."""
    made = client.chat.completions.create(model=it.model, messages=[look(it.uri)], temperature=0)
    message, used = made.choices[0].message, made.usage
    assert message.content and it.word in message.content, f"no {it.word!r} in {message}"
    assert made.choices[0].finish_reason == "stop", made
    assert used and used.total_tokens == used.prompt_tokens + used.completion_tokens > 0, used
    assert made._request_id, "x-request-id is not answered"
    done("image")
    return message


def turns(client: openai.OpenAI, it: Task, first: ChatCompletionMessage) -> None:
    made = client.chat.completions.create(
        model=it.model,
        messages=[
            {"role": "system", "content": "You see one shape."},
            look(it.uri),
            first,  # as it came, with every field
            {"role": "user", "content": "Once more, please."},
        ],
        max_tokens=3,
    )
    assert made.choices[0].finish_reason == "length", made
    assert made.usage and made.usage.completion_tokens == 3, made.usage
    done("several turns")


def streams(client: openai.OpenAI, it: Task, whole: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model=it.model,
            messages=[look(it.uri)],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [one.choices[0].delta.content or "" for one in chunks if one.choices]
    assert "".join(texts) == whole, f"{texts} is not {whole!r}"
    assert sum(map(bool, texts)) > 1, "the answer came in one piece"
    assert chunks[-1].usage and not chunks[-1].choices, chunks[-1]
    assert all(one.usage is None for one in chunks[:-1]), "usage before the end"
    with client.chat.completions.stream(
        model=it.model, messages=[look(it.uri)], temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == whole
    done("streaming with usage")


def several(client: openai.OpenAI, it: Task) -> None:
    asked = {"model": it.model, "messages": [look(it.uri)], "n": 2, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion()
    for made in (whole, streamed):
        texts = {one.index: one.message.content for one in made.choices}
        assert list(texts) == [0, 1], texts
        assert all(it.word in (text or "") for text in texts.values()), texts
    done("two answers")


def errors(client: openai.OpenAI, it: Task) -> None:
    chat = client.chat.completions
    with raises(openai.NotFoundError):
        chat.create(model=NO_MODEL, messages=[look(it.uri)])
    with raises(openai.AuthenticationError):
        client.with_options(api_key=WRONG_KEY).models.list()
    try:
        chat.create(model=it.model, messages=[look(NO_IMAGE)])
    except openai.BadRequestError as error:
        assert error.param == "messages.0.content.1.image_url.url" and error.code, error.body
    else:
        raise AssertionError("what is no image was taken")
    with raises(openai.BadRequestError):
        chat.create(model=it.model, messages=[look(it.uri)], stream=True, temperature=9)
    done("errors")


def main() -> None:
    it, client = task("openai"), openai.OpenAI()
    models(client, it)
    first = image(client, it)
    turns(client, it, first)
    streams(client, it, first.content or "")
    several(client, it)
    errors(client, it)


if __name__ == "__main__":
    main()
