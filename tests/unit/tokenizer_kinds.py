# SPDX-License-Identifier: Apache-2.0
"""The tokenizers that our models have: byte-level BPE (nano) and Llama's BPE with byte fallback,
in each of the three ways in which Llama tokenizers are written to disk.
"""

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is in the image? ASSISTANT: A red circle left of a blue square, on white.",
    "the image shows a small green triangle; the background is grey.\n\nIt is bright.",
] * 4
KINDS = ("byte_level", "llama_first", "llama_always", "llama_legacy")


def added() -> list[AddedToken]:
    return [AddedToken(one, special=True, normalized=False) for one in SPECIALS]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=added(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama(kind: str) -> Tokenizer:
    """Train Llama's kind of BPE, then write it down in one of its three forms."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*added(), *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    # Byte tokens are vocabulary, not added tokens: as added ones they would match typed text.
    data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] in SPECIALS]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    space = "\u2581"
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if kind == "llama_legacy":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        )
    else:
        scheme = kind.removeprefix("llama_")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    return tokenizer


def make(kind: str) -> Tokenizer:
    """Return a trained tokenizer of one of `KINDS`."""
    return byte_level() if kind == "byte_level" else llama(kind)
