# SPDX-License-Identifier: Apache-2.0
"""A small random model, and one engine of each kind, started once and shared by all tests here."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sg4v_ray.inference.engine import Engine, Generation, Pixels, Request
from sg4v_ray.inference.open import EngineConfig, open_engine
from sg4v_ray.model import weights
from sg4v_ray.model.config import ModelConfig, nano
from sg4v_ray.model.conversation import chat_template
from sg4v_ray.model.processor import save_processor

MODEL: Final[ModelConfig] = replace(nano(), vocab_size=320, max_positions=512)

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Ask = Callable[..., Request]


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Engines belong to one event loop, so all tests use this one."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder. Weights are scaled up: at CLIP's and Llama's own initialisation every
    image gets nearly the same answer, and the two best tokens are nearly tied."""
    folder = tmp_path_factory.mktemp("model")
    model = weights.create(MODEL, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    weights.save(model, folder, dtype="float32")
    save_processor(
        folder,
        config=MODEL,
        tokenizer_file=_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"),
        chat_template=chat_template("vicuna_v1"),
        geometry="pad",
    )
    return folder


def _tokenizer(file: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a red circle on a pale background, a blue triangle"], trainer)
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def engines(model_folder: Path, run: Run) -> Iterator[dict[str, Engine]]:
    """Opened, not started."""
    opened = {
        kind: open_engine(
            EngineConfig(
                kind=kind,
                dtype="float32",
                capacity=4,
                max_model_len=MODEL.max_positions,
                compile=False,
                kv_cache_gb=0.25,
                latency_s=0.002,
            ),
            model_folder,
            threads=2,
        )
        for kind in ("fake", "hf", "vllm")
    }
    yield opened
    for engine in opened.values():
        run(engine.close())


# vLLM imports torch in three processes before it is ready: minutes on a busy machine.
@pytest.fixture(
    params=[
        "fake",
        "hf",
        pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(900)]),
    ]
)
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine], run: Run) -> Engine:
    """Each engine in turn, running."""
    chosen = engines[request.param]
    run(chosen.start())
    return chosen


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    """The shape of the model that all engines run."""
    return MODEL


@pytest.fixture(scope="session")
def pictures() -> list[Pixels]:
    """32 squares of colored blocks."""
    rng = np.random.default_rng(0)
    block = np.ones((16, 16, 1), np.uint8)
    return [np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), block) for _ in range(32)]


@pytest.fixture(scope="session")
def ask() -> Ask:
    """Make a request with its images after the first token."""

    def make(*images: Pixels, words: int = 4, max_tokens: int = 8, **how: Any) -> Request:
        placeholders = (MODEL.image_token_id,) * len(images)
        return Request(
            token_ids=(1, 50, *placeholders, *(60 + index % 200 for index in range(words))),
            images=images,
            generation=Generation(max_tokens=max_tokens, **how),
        )

    return make
