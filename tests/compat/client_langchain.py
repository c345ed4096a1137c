# SPDX-License-Identifier: Apache-2.0
"""langchain-openai, configured by OPENAI_API_BASE and OPENAI_API_KEY."""

import base64

import openai
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from steps import NO_IMAGE, NO_MODEL, WRONG_KEY, Task, done, raises, task


def look(uri: str) -> HumanMessage:
    """Return a message with an image, as OpenAI writes it."""
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": uri}},
    ]
    return HumanMessage(parts)


def block(it: Task) -> HumanMessage:
    """Return a message with an image, as LangChain writes it for every provider."""
    data = base64.b64encode(it.image.read_bytes()).decode()
    image = {"type": "image", "base64": data, "mime_type": "image/png"}
    return HumanMessage(content_blocks=[{"type": "text", "text": "What is this?"}, image])


def image(chat: ChatOpenAI, it: Task) -> AIMessage:
    """Ask about the image, return the answer."""
    made = chat.invoke([look(it.uri)])
    assert it.word in made.text, f"no {it.word!r} in {made.text!r}"
    assert made.response_metadata["finish_reason"] == "stop", made
    used = made.usage_metadata
    assert used and used["total_tokens"] == used["input_tokens"] + used["output_tokens"] > 0, used
    assert chat.invoke([block(it)]).text == made.text, "a content block is another image"
    done("image")
    return made


def turns(chat: ChatOpenAI, it: Task, first: AIMessage) -> None:
    told = SystemMessage("You see one shape.")
    made = chat.invoke(
        [told, look(it.uri), first, HumanMessage("Once more, please.")], max_tokens=3
    )
    assert made.response_metadata["finish_reason"] == "length", made
    done("several turns")


def streams(chat: ChatOpenAI, it: Task, whole: str) -> None:
    chunks = list(chat.stream([look(it.uri)]))
    assert sum(bool(one.text) for one in chunks) > 1, "the answer came in one piece"
    made = sum(chunks[1:], chunks[0])
    assert isinstance(made, AIMessageChunk) and made.text == whole, made
    assert made.usage_metadata and made.usage_metadata["output_tokens"] > 0, made
    done("streaming with usage")


def errors(chat: ChatOpenAI, it: Task) -> None:
    with raises(openai.NotFoundError):
        ChatOpenAI(model=NO_MODEL).invoke([look(it.uri)])
    with raises(openai.AuthenticationError):
        ChatOpenAI(model=it.model, api_key=WRONG_KEY).invoke([look(it.uri)])
    with raises(openai.BadRequestError):
        chat.invoke([look(NO_IMAGE)])
    done("errors")


def main() -> None:
    it = task("langchain-openai")
    chat = ChatOpenAI(model=it.model, temperature=0, stream_usage=True)
    made = image(chat, it)
    turns(chat, it, made)
    streams(chat, it, made.text)
    errors(chat, it)


if __name__ == "__main__":
    main()
