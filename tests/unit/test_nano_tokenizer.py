# SPDX-License-Identifier: Apache-2.0
"""The committed tokenizer is the one that its function makes, and it can spell anything."""

import pytest
from tokenizers import Tokenizer

from sg4v_ray.model.config import nano
from sg4v_ray.recipes.nano_tokenizer import build, corpus, file


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(file()))


def test_it_can_be_made_again(tokenizer: Tokenizer) -> None:
    assert build(corpus()).to_str() == tokenizer.to_str()


def test_special_tokens_are_where_the_model_expects_them(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(one) for one in ("<unk>", "<s>", "</s>", "<pad>", "<image>")]
    assert ids == [0, 1, 2, nano().pad_token_id, nano().image_token_id]
    assert tokenizer.get_vocab_size() <= nano().vocab_size


def test_every_word_of_its_world_is_one_token(tokenizer: Tokenizer) -> None:
    text = "USER: what color is the rectangle? ASSISTANT: A small teal triangle in the top left."
    words = len(text.replace(":", " :").replace("?", " ?").replace(".", " .").split())
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == words


@pytest.mark.parametrize("text", ["Quokka!", "\u732b\u306f\u732b", "\U0001f600 a\n\tb"])
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
