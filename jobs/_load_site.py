# SPDX-License-Identifier: Apache-2.0
"""What the serving bench serves: a model of random weights whose every token is a word."""

import json
import tempfile
from pathlib import Path
from typing import Final

import torch

from jobs import _bench_site as site
from sg4v_ray.core.artifact import begin, commit
from sg4v_ray.core.lease import hold
from sg4v_ray.core.storage import Storage
from sg4v_ray.model.config import EOS_TOKEN_ID, ModelConfig
from sg4v_ray.model.conversation import chat_template
from sg4v_ray.model.processor import save_processor
from sg4v_ray.model.weights import create, save
from sg4v_ray.recipes import nano_tokenizer

MODEL: Final = site.model_150m()
_SPACE: Final = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
"""How byte-level tokenizers write the space before a word."""


def make_model(storage: Storage) -> Path:
    """Write the model as the captioner artifact; return its folder.

    Random weights make any token: each is text, so that every step of an answer is an event, and
    none is the end, so that answers have the length that was asked for.
    """
    config = {"model": MODEL, "use": "serving"}
    home = begin(storage, site.CAPTIONER, config)
    with tempfile.TemporaryDirectory() as scratch, hold(home) as lease:
        folder = Path(scratch, "model")
        model = create(MODEL, seed=0)
        with torch.no_grad():
            model.lm_head.weight[EOS_TOKEN_ID] = 0  # of 49,152 logits the largest is above 0
        save(model, folder, dtype="bfloat16")
        words = Path(scratch, "words.json")
        words.write_text(_words(MODEL))
        save_processor(
            folder,
            config=MODEL,
            tokenizer_file=words,
            chat_template=chat_template("vicuna_v1"),
            geometry="pad",
        )
        digests = home.upload(folder, "model")
        commit(
            storage, site.CAPTIONER, config=config, inputs={}, counts={}, digests=digests,
            lease=lease,
        )  # fmt: skip
    return Path(storage.root, site.CAPTIONER.path, "model")


def _words(model: ModelConfig) -> str:
    """Return the nano's tokenizer with a word for every other id of the model."""
    tokenizer = json.loads(nano_tokenizer.file().read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"{_SPACE}word{number}": number for number in range(len(vocab), model.vocab_size)}
    return json.dumps(tokenizer, ensure_ascii=False)
