# SPDX-License-Identifier: Apache-2.0
"""What several groups of tests share."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from hypothesis import settings
from moto.server import ThreadedMotoServer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# How long a case takes says nothing about it: the machine may be busy.
settings.register_profile("sg4v", deadline=None)
settings.load_profile("sg4v")


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


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go."""
    folder = os.environ.get("SG4V_SCREENSHOTS")
    if folder is None:
        return tmp_path_factory.mktemp("screenshots")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A local S3 with the bucket `sg4v-test`, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="sg4v-test")
    yield environment
    server.stop()
