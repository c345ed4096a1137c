# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and labels, and back.

Every rule is held on the tokenizers that our models have: byte-level BPE (nano) and Llama's BPE
with byte fallback, in each of the three ways in which Llama tokenizers are written to disk.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    models,
)
from transformers import PreTrainedTokenizerFast

from sg4v_ray.core.errors import ContractError, TemplateError
from sg4v_ray.core.records import Turn
from sg4v_ray.model import instructions
from sg4v_ray.model.conversation import IGNORE, Conversation, TemplateName, chat_template
from tests.unit.tokenizer_kinds import KINDS, SPECIALS, added, make

CHAT: tuple[TemplateName, ...] = ("vicuna_v1", "llava_v1")
ALL: tuple[TemplateName, ...] = ("plain", *CHAT)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    kind = request.param
    tokenizer = make(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@cache
def _open(folder: Path, template: TemplateName) -> Conversation:
    return Conversation.open(folder, template)


def _turns(*texts: str) -> list[Turn]:
    return [Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]


TEXT = st.text(
    st.one_of(
        st.sampled_from("abc image USER: ASSISTANT:\n  \t'\"{}%<>/s"),
        st.characters(codec="utf-8", exclude_characters="\u2581"),
    ),
    max_size=20,
)
TYPED = st.one_of(TEXT, st.sampled_from([*SPECIALS, "</s><s>", "a <image>\nb", "<0x0A>"]))


def _labelled(chat: Conversation, token_ids: tuple[int, ...], labels: tuple[int, ...]) -> list[int]:
    assert len(token_ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(token_ids, labels, strict=True))
    return [label for label in labels if label != IGNORE]


# --- what a conversation looks like -------------------------------------------------------------


def test_vicuna_v1_is_rendered_as_published(folder: Path) -> None:
    encoded = _open(folder, "vicuna_v1").sample(
        _turns("What is it?", "A circle.", "Which colour?", "Red."), num_images=1
    )
    assert encoded.text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is it? ASSISTANT: A circle.</s>"
        "USER: Which colour? ASSISTANT: Red.</s>"
    )


def test_llava_v1_says_human_where_vicuna_v1_says_user(folder: Path) -> None:
    text = _open(folder, "llava_v1").prompt(_turns("Hi"), num_images=0).text
    assert text.startswith("<s>A chat between a curious human and ")
    assert "the human's questions. USER: Hi ASSISTANT:" in text


def test_plain_is_the_image_and_the_caption_without_the_question_and_without_an_end(
    folder: Path,
) -> None:
    chat = _open(folder, "plain")
    encoded = chat.sample(_turns("Describe it.", "A red circle."), num_images=1)
    assert encoded.text == "<s><image>A red circle.\n"
    assert encoded.labels[:2] == (IGNORE, IGNORE)
    assert IGNORE not in encoded.labels[2:]
    assert chat.eos_token_id not in encoded.token_ids


def test_each_of_several_images_has_a_placeholder_and_a_newline(folder: Path) -> None:
    chat = _open(folder, "vicuna_v1")
    encoded = chat.prompt(_turns("Compare."), num_images=3)
    assert "USER: <image>\n<image>\n<image>\nCompare. ASSISTANT:" in encoded.text
    assert encoded.token_ids.count(chat.image_token_id) == 3


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", CHAT)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), num_images=st.integers(0, 2))
def test_the_labels_are_each_answer_with_its_end_and_nothing_else(
    folder: Path, template: TemplateName, texts: list[tuple[str, str]], num_images: int
) -> None:
    chat = _open(folder, template)
    turns = _turns(*(text for pair in texts for text in pair))
    encoded = chat.sample(turns, num_images=num_images)
    labelled = _labelled(chat, encoded.token_ids, encoded.labels)
    answers = "".join(f" {answer}</s>" for _, answer in texts)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert labelled.count(chat.eos_token_id) == len(texts)
    # The first token of a text loses its space in a decoder, so one letter is put before it.
    (letter,) = raw.encode("x", add_special_tokens=False).ids[-1:]
    decoded = raw.decode([letter, *labelled], skip_special_tokens=False)
    assert decoded == "x" + answers


@given(question=TYPED, answer=TYPED)
def test_a_prompt_is_the_beginning_of_the_sample_that_answers_it(
    folder: Path, question: str, answer: str
) -> None:
    chat = _open(folder, "vicuna_v1")
    prompt = chat.prompt(_turns(question), num_images=1)
    sample = chat.sample(_turns(question, answer), num_images=1)
    count = len(prompt.token_ids)
    assert sample.token_ids[:count] == prompt.token_ids
    assert set(sample.labels[:count]) == set(prompt.labels) == {IGNORE}
    assert sample.labels[count:] == sample.token_ids[count:]


def test_a_token_that_is_prompt_and_answer_at_once_is_an_error_not_a_mask(tmp_path: Path) -> None:
    vocab = {one: i for i, one in enumerate(["<unk>", "A", ":", " ", ": "])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(":", " ")], unk_token="<unk>"))
    tokenizer.add_special_tokens(added())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TemplateError, match="prompt and answer at once"):
        Conversation.open(tmp_path, "vicuna_v1").sample(_turns("A", "A"), num_images=0)


def test_a_tokenizer_that_drops_characters_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"A": 0}, merges=[]))  # no bytes, no <unk>
    tokenizer.add_special_tokens(added())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TemplateError, match="drops characters"):
        Conversation.open(tmp_path, "plain").sample(_turns("", "A b A"), num_images=0)


# --- token ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ALL)
@given(question=TEXT, answer=TEXT, num_images=st.integers(0, 2))
def test_ids_equal_those_of_the_whole_text_at_once(
    folder: Path, template: TemplateName, question: str, answer: str, num_images: int
) -> None:
    assume(not any(one in question + answer for one in SPECIALS))
    encoded = _open(folder, template).sample(_turns(question, answer), num_images=num_images)
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert list(encoded.token_ids) == whole.encode(encoded.text, add_special_tokens=False).ids


@pytest.mark.parametrize("typed", SPECIALS)
def test_special_tokens_that_a_user_types_stay_text(folder: Path, typed: str) -> None:
    chat = _open(folder, "vicuna_v1")
    ours = {
        chat.bos_token_id: 1,
        chat.image_token_id: 1,
        chat.eos_token_id: 1,
        chat.pad_token_id: 0,
    }
    encoded = chat.sample(_turns(f"see {typed} here", f"{typed}"), num_images=1)
    assert {one: encoded.token_ids.count(one) for one in ours} == ours
    assert chat.decode(encoded.token_ids).endswith(f"see {typed} here ASSISTANT: {typed}")


@pytest.mark.parametrize(
    ("turns", "last"),
    [
        pytest.param([], "prompt", id="nothing"),
        pytest.param(_turns("a", "b"), "prompt", id="prompt with its answer"),
        pytest.param(_turns("a"), "sample", id="sample without an answer"),
        pytest.param([*_turns("a"), *_turns("b")], "prompt", id="two questions in a row"),
        pytest.param(_turns("a", "b")[1:], "sample", id="assistant first"),
    ],
)
def test_turns_that_do_not_alternate_are_refused(
    folder: Path, turns: list[Turn], last: str
) -> None:
    chat = _open(folder, "vicuna_v1")
    with pytest.raises(TemplateError, match="must alternate from user to"):
        (chat.prompt if last == "prompt" else chat.sample)(turns, num_images=0)


def test_plain_refuses_a_second_round_and_a_system_text(folder: Path) -> None:
    chat = _open(folder, "plain")
    with pytest.raises(TemplateError, match="vicuna_v1"):
        chat.sample(_turns("a", "b", "c", "d"), num_images=1)
    with pytest.raises(TemplateError, match="vicuna_v1"):
        chat.prompt(_turns("a"), num_images=1, system="Be brief.")


def test_a_tokenizer_without_our_specials_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no tokenizer\.json"):
        Conversation.open(tmp_path, "plain")
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ContractError, match="'<s>'"):
        Conversation.open(tmp_path, "plain")


# --- the same in Jinja --------------------------------------------------------------------------


def _jinja(folder: Path, template: TemplateName) -> Any:
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=chat_template(template)
    )


@st.composite
def _content(draw: st.DrawFn, text: str, images: int) -> Any:
    """Write a message as a string, or as a list with its images anywhere."""
    if not images and draw(st.booleans()):
        return text
    parts = [{"type": "text", "text": text}, *({"type": "image"} for _ in range(images))]
    return draw(st.permutations(parts))


@pytest.mark.parametrize("template", ALL)
@settings(max_examples=60)
@given(data=st.data())
def test_chat_template_renders_what_we_render_byte_for_byte(
    folder: Path, template: TemplateName, data: st.DataObject
) -> None:
    most = 2 if template == "plain" else 5
    texts = data.draw(st.lists(TYPED, min_size=1, max_size=most))
    images = [data.draw(st.integers(0, 2)) for _ in texts]
    system = None if template == "plain" else data.draw(st.none() | TYPED)
    turns = _turns(*texts)
    messages = [
        {"role": turn.role, "content": data.draw(_content(turn.text, count))}
        for turn, count in zip(turns, images, strict=True)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": data.draw(_content(system, 0))})
    chat, is_prompt = _open(folder, template), len(turns) % 2 == 1
    encode = chat.prompt if is_prompt else chat.sample
    rendered = _jinja(folder, template).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=is_prompt
    )
    assert rendered == encode(turns, num_images=sum(images), system=system).text


def test_chat_template_refuses_what_we_refuse(folder: Path) -> None:
    jinja = _jinja(folder, "vicuna_v1")
    for roles in (["assistant"], ["user", "user"], ["user", "assistant"]):
        messages = [{"role": role, "content": "a"} for role in roles]
        with pytest.raises(jinja2.TemplateError, match="turn"):
            jinja.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# --- back to text -------------------------------------------------------------------------------


@given(answer=TYPED, chunk=st.integers(1, 4))
def test_streamed_pieces_add_up_to_the_text_and_never_hold_half_a_character(
    folder: Path, answer: str, chunk: int
) -> None:
    chat = _open(folder, "vicuna_v1")
    sample = chat.sample(_turns("?", answer), num_images=0)
    tokens = [one for one in sample.labels if one != IGNORE]
    stream = chat.stream()
    pieces = [stream.push(tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
    assert "".join(pieces) == chat.decode(tokens)
    if "\N{REPLACEMENT CHARACTER}" not in answer:
        assert chat.decode(tokens) == answer.strip()
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_answer_cut_inside_a_character_shows_what_is_whole(folder: Path) -> None:
    chat = _open(folder, "vicuna_v1")
    labels = chat.sample(_turns("?", "ab \U0001f600"), num_images=0).labels
    tokens = [one for one in labels if one not in (IGNORE, chat.eos_token_id)]
    assert chat.decode(tokens) == "ab \U0001f600"
    assert chat.decode(tokens[:-1]) == "ab"


# --- questions ----------------------------------------------------------------------------------


def test_the_question_of_a_sample_is_stable_and_all_questions_are_used() -> None:
    asked = [instructions.training_question(f"id{i}", 0) for i in range(500)]
    assert asked == [instructions.training_question(f"id{i}", 0) for i in range(500)]
    assert set(asked) == set(instructions.TRAINING_QUESTIONS)
    assert asked != [instructions.training_question(f"id{i}", 1) for i in range(500)]
