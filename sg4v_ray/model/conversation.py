# SPDX-License-Identifier: Apache-2.0
"""From turns to token ids and labels: the only place where text meets the tokenizer.

The text is rendered once and tokenised once. Labels follow from character offsets, so a mask can
not drift from the tokens it masks. `chat_template` says the same in Jinja, byte for byte.

Tokens such as `<image>` or `</s>` mean something only where the template wrote them: typed by a
user they stay text. An image has one placeholder here; whoever makes tensors expands it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from sg4v_ray.core.errors import ContractError, TemplateError
from sg4v_ray.core.records import Turn
from sg4v_ray.model import jinja

TemplateName = Literal["plain", "vicuna_v1", "llava_v1"]

IGNORE = -100
"""The label of a token that the loss does not see."""

_BOS, _EOS, _IMAGE, _PAD = "<s>", "</s>", "<image>", "<pad>"
_PERSON: dict[TemplateName, str] = {"vicuna_v1": "user", "llava_v1": "human"}


def system_prompt(template: TemplateName) -> str:
    """Return the sentences that open a chat of a template other than `plain`."""
    person = _PERSON[template]
    return (
        f"A chat between a curious {person} and an artificial intelligence assistant. The "
        f"assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised conversation; `labels` has the length of `token_ids`."""

    text: str
    """What was tokenised, special tokens included. For people: typed specials look the same."""
    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token itself where the loss counts, else -100; not shifted."""


@dataclass(frozen=True, slots=True)
class _Part:
    text: str
    is_special: bool = False
    is_answer: bool = False


class Conversation:
    """A tokenizer and a template; made by `open`."""

    def __init__(self, tokenizer: Tokenizer, template: TemplateName) -> None:
        self.template: TemplateName = template
        self._tokenizer = tokenizer
        self._ids = {one: _special_id(tokenizer, one) for one in (_BOS, _EOS, _IMAGE, _PAD)}

    @classmethod
    def open(cls, folder: Path, template: TemplateName) -> "Conversation":
        """Read `tokenizer.json` of a model folder.

        Raises:
            ContractError: the file is missing, or lacks one of the four special tokens.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ContractError(f"{folder} has no tokenizer.json; export the tokenizer with it")
        return cls(_text_tokenizer(file.read_text(encoding="utf-8")), template)

    def __reduce__(self) -> tuple[Callable[..., "Conversation"], tuple[str, TemplateName]]:
        # A pickled tokenizer forgets that typed specials are text.
        return _reopened, (self._tokenizer.to_str(), self.template)

    @property
    def bos_token_id(self) -> int:
        """The token that starts every conversation."""
        return self._ids[_BOS]

    @property
    def eos_token_id(self) -> int:
        """The token that ends every answer (but not a `plain` caption)."""
        return self._ids[_EOS]

    @property
    def image_token_id(self) -> int:
        """The placeholder of an image."""
        return self._ids[_IMAGE]

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows of a batch."""
        return self._ids[_PAD]

    def prompt(
        self, turns: Sequence[Turn], *, num_images: int, system: str | None = None
    ) -> Encoded:
        """Encode a conversation that waits for an answer; all labels are -100.

        Args:
            turns: user first, alternating, user last.
            num_images: placeholders to put before the first user text.
            system: replaces the template's system text.

        Raises:
            TemplateError: the turns are not such a conversation.
        """
        _check_turns(turns, last="user")
        return self._encode(self._parts(turns, num_images, system))

    def sample(
        self, turns: Sequence[Turn], *, num_images: int, system: str | None = None
    ) -> Encoded:
        """Encode a conversation to learn from: the answers, and only they, are labelled.

        An answer starts right after `ASSISTANT:`, so its leading space is part of it, and ends
        with `</s>`. A `plain` caption ends with its newline; no end token is learnt there.

        Raises:
            TemplateError: the turns do not alternate from user to assistant, or one token holds
                both prompt and answer, so that no exact mask exists.
        """
        _check_turns(turns, last="assistant")
        return self._encode(self._parts(turns, num_images, system))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of an answer: without specials, stripped, whole characters only."""
        text = str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
        if "\N{REPLACEMENT CHARACTER}" in text:  # parts of characters: only the stream is exact
            return self.stream().push(token_ids)
        return text.strip()

    def stream(self) -> "TextStream":
        """Return a decoder for the tokens of one answer as they are made."""
        return TextStream(self._tokenizer)

    def _parts(self, turns: Sequence[Turn], num_images: int, system: str | None) -> list[_Part]:
        if self.template == "plain":
            return list(_plain_parts(turns, num_images, system))
        text = system_prompt(self.template) if system is None else system
        return list(_chat_parts(turns, num_images, text))

    def _encode(self, parts: list[_Part]) -> Encoded:
        token_ids: list[int] = []
        labels: list[int] = []
        for is_special, group in groupby(parts, key=lambda part: part.is_special):
            run = list(group)
            tokens = self._specials(run) if is_special else self._text(run)
            for token, is_answer in tokens:
                token_ids.append(token)
                labels.append(token if is_answer else IGNORE)
        return Encoded("".join(part.text for part in parts), tuple(token_ids), tuple(labels))

    def _specials(self, run: list[_Part]) -> Iterator[tuple[int, bool]]:
        return ((self._ids[part.text], part.is_answer) for part in run)

    def _text(self, run: list[_Part]) -> Iterator[tuple[int, bool]]:
        """Yield the tokens between two specials, and whether each belongs to an answer."""
        text = "".join(part.text for part in run)
        in_answer = [part.is_answer for part in run for _ in part.text]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if text and (not encoding.offsets or encoding.offsets[-1][1] != len(text)):
            # Such a tokenizer also reports the offsets of all that follows wrongly.
            raise TemplateError(
                f"the tokenizer drops characters of {text!r}; it needs bytes or an unknown token"
            )
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            sides = set(in_answer[start:end])
            if len(sides) != 1:
                raise TemplateError(
                    f"token {token} ({self._tokenizer.id_to_token(token)!r}) covers "
                    f"{text[start:end]!r}, which is prompt and answer at once; train a tokenizer "
                    "that does not merge across spaces"
                )
            yield token, sides.pop()


class TextStream:
    """Turns tokens into text as they come; never shows half a character.

    White space at the end is held back until something follows it, so that the pieces add up to
    exactly what `Conversation.decode` returns.
    """

    # Decoded with the tokens of the piece before: a decoder drops the first space of a text.
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._new: list[int] = []
        self._space = ""
        self._started = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that is now certain, perhaps none."""
        return self._strip("".join(map(self._step, token_ids)))

    def _step(self, token: int) -> str:
        self._new.append(token)
        before = self._tokenizer.decode(self._shown, skip_special_tokens=True)
        after = self._tokenizer.decode(self._shown + self._new, skip_special_tokens=True)
        if len(after) <= len(before) or after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._shown, self._new = self._new, []
        return after[len(before) :]

    def _strip(self, text: str) -> str:
        text = self._space + text
        if not self._started:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._started = self._started or bool(shown)
        return shown


def chat_template(template: TemplateName) -> str:
    """Return the Jinja form of a template for `chat_template` of a saved tokenizer.

    Text parts of one message are joined by a newline. Images are counted over all messages and
    stand before the first user text, wherever they stood.
    """
    if template == "plain":
        return jinja.plain()
    return jinja.chat(system_prompt(template))


def _check_turns(turns: Sequence[Turn], *, last: str) -> None:
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    roles = [turn.role for turn in turns]
    if roles != expected or not roles or roles[-1] != last:
        raise TemplateError(
            f"turns must alternate from user to {last}, got {', '.join(roles) or 'none'}"
        )


def _plain_parts(turns: Sequence[Turn], num_images: int, system: str | None) -> Iterator[_Part]:
    if len(turns) > 2 or system is not None:
        raise TemplateError(
            "the template 'plain' holds one caption, without system text; "
            "use 'vicuna_v1' for conversations"
        )
    yield _Part(_BOS, is_special=True)
    for _ in range(num_images):
        yield _Part(_IMAGE, is_special=True)
    for turn in turns[1:]:
        yield _Part(f"{turn.text}\n", is_answer=True)


def _chat_parts(turns: Sequence[Turn], num_images: int, system: str) -> Iterator[_Part]:
    yield _Part(_BOS, is_special=True)
    yield _Part(f"{system} ")
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            yield _Part(f" {turn.text}", is_answer=True)
            yield _Part(_EOS, is_special=True, is_answer=True)
            continue
        yield _Part("USER: ")
        for _ in range(num_images if i == 0 else 0):
            yield _Part(_IMAGE, is_special=True)
            yield _Part("\n")
        yield _Part(f"{turn.text} ASSISTANT:")


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    for number, added in tokenizer.get_added_tokens_decoder().items():
        # A token that is matched after normalisation, or that eats the space beside it, would
        # make the ids depend on what stands around it.
        exact = not (added.normalized or added.lstrip or added.rstrip or added.single_word)
        if added.content == token and added.special and exact:
            return int(number)
    raise ContractError(
        f"the tokenizer has no special token {token!r}; add it with special=True, "
        "normalized=False and without lstrip, rstrip, single_word"
    )


def _text_tokenizer(data: str) -> Tokenizer:
    """Return a tokenizer for the texts between specials.

    Metaspace with the scheme "first" puts its prefix before a piece at character 0 only. Our
    texts start with `<s>` there, so no piece of ours gets one although each is encoded apart.
    """
    config = json.loads(data)
    for one in _pre_tokenizers(config.get("pre_tokenizer")):
        if one["type"] == "Metaspace" and one.get("prepend_scheme") == "first":
            one["prepend_scheme"] = "never"
    tokenizer = Tokenizer.from_str(json.dumps(config))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _reopened(data: str, template: TemplateName) -> Conversation:
    return Conversation(_text_tokenizer(data), template)


def _pre_tokenizers(config: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if config is None:
        return
    yield config
    for one in config.get("pretokenizers", ()):
        yield from _pre_tokenizers(one)
