# SPDX-License-Identifier: Apache-2.0
"""What several groups of tests share."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights, for a fake engine: 16 pixels, 4 tokens an image."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[
            AddedToken(one, special=True, normalized=False)
            for one in ("<unk>", "<s>", "</s>", "<pad>", "<image>")
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "A chat between a curious user and an assistant. USER: What is it? ASSISTANT: a circle"
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llava",
        "image_token_index": 4,
        "vision_config": {"image_size": 16, "patch_size": 8},
        "text_config": {
            "vocab_size": 400,
            "max_position_embeddings": 512,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
