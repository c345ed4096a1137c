# SPDX-License-Identifier: Apache-2.0
"""litellm as a library, with its `openai/` provider: OPENAI_BASE_URL and OPENAI_API_KEY."""

import os
from typing import Any

import litellm
from steps import NO_IMAGE, NO_MODEL, WRONG_KEY, Task, done, raises, task


def look(uri: str) -> dict[str, Any]:
    """Return a message with an image."""
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": uri}},
    ]
    return {"role": "user", "content": parts}


def models(it: Task) -> None:
    found = litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=os.environ["OPENAI_BASE_URL"],  # the one call that does not look there itself
    )
    assert it.model in found, found
    done("models")


def image(it: Task) -> litellm.ModelResponse:
    """Ask about the image, return the answer."""
    made = litellm.completion(f"openai/{it.model}", messages=[look(it.uri)], temperature=0)
    message, used = made.choices[0].message, made.usage
    assert it.word in message.content, f"no {it.word!r} in {message}"
    assert made.choices[0].finish_reason == "stop", made
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens > 0, used
    done("image")
    return made


def turns(it: Task, first: litellm.Message) -> None:
    made = litellm.completion(
        f"openai/{it.model}",
        messages=[
            {"role": "system", "content": "You see one shape."},
            look(it.uri),
            first,  # as it came, with every field
            {"role": "user", "content": "Once more, please."},
        ],
        max_tokens=3,
    )
    assert made.choices[0].finish_reason == "length", made
    done("several turns")


def streams(it: Task, whole: litellm.ModelResponse) -> None:
    chunks = list(
        litellm.completion(
            f"openai/{it.model}",
            messages=[look(it.uri)],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    built = litellm.stream_chunk_builder(chunks)
    assert (
        built is not None and built.choices[0].message.content == whole.choices[0].message.content
    )
    assert len(chunks) > 3, "the answer came in one piece"
    used = [one.usage for one in chunks if getattr(one, "usage", None)]
    # Without usage in the stream it makes a guess, which knows nothing of an image's tokens.
    assert [one.total_tokens for one in used] == [whole.usage.total_tokens], used
    done("streaming with usage")


def errors(it: Task) -> None:
    with raises(litellm.NotFoundError):
        litellm.completion(f"openai/{NO_MODEL}", messages=[look(it.uri)])
    with raises(litellm.AuthenticationError):
        litellm.completion(f"openai/{it.model}", messages=[look(it.uri)], api_key=WRONG_KEY)
    with raises(litellm.BadRequestError):
        litellm.completion(f"openai/{it.model}", messages=[look(NO_IMAGE)])
    done("errors")


def main() -> None:
    it = task("litellm")
    litellm.suppress_debug_info = True
    models(it)
    whole = image(it)
    turns(it, whole.choices[0].message)
    streams(it, whole)
    errors(it)


if __name__ == "__main__":
    main()
