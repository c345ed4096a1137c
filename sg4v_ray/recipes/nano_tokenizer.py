# SPDX-License-Identifier: Apache-2.0
"""The nano's tokenizer: whole words of its small world, bytes for everything else.

Llama's special tokens keep Llama's ids. Words are taken from a fixed text, so the file
`nano_tokenizer.json` can be made again at any time (a test does).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Final

import easy_vqa
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sg4v_ray.model.conversation import system_prompt
from sg4v_ray.model.instructions import TRAINING_QUESTIONS
from sg4v_ray.recipes.easy_vqa_teacher import describe, look
from sg4v_ray.sources import shapes

SPECIAL_TOKENS: Final = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
VOCAB_SIZE: Final = 512


def build(texts: Iterable[str]) -> Tokenizer:
    """Make a byte-level tokenizer whose words are those that save most tokens in `texts`.

    A word costs one entry and saves its length less one each time it occurs. There are no
    merges: a word that is not in the vocabulary is spelled in bytes.
    """
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(word for word, _ in pre.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    saved = sorted(
        (word for word in seen if len(word) > 1), key=lambda w: (-seen[w] * (len(w) - 1), w)
    )
    words = saved[: VOCAB_SIZE - len(SPECIAL_TOKENS) - len(alphabet)]
    vocab = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(one, special=True, normalized=False) for one in SPECIAL_TOKENS]
    )
    return tokenizer


def corpus() -> Iterator[str]:
    """Yield what the nano reads and writes: questions and their prompts, wordings, answers."""
    for question in (*TRAINING_QUESTIONS, *dict.fromkeys(easy_vqa.get_train_questions()[0])):
        yield f"{system_prompt('vicuna_v1')} USER: \n{question} ASSISTANT:"
        yield f"USER: {question} ASSISTANT:"
    for seed in range(2_000):
        facts = look(shapes.draw(seed))
        yield f" {describe(facts, seed)}"
        yield describe(facts, seed)
    for answer in easy_vqa.get_answers():
        yield from (f" {answer}",) * 100


def file() -> Path:
    """Return the tokenizer file of the installed package."""
    return Path(str(resources.files("sg4v_ray.recipes"))) / "nano_tokenizer.json"
