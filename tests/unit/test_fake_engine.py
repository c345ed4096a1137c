# SPDX-License-Identifier: Apache-2.0
"""What only the fake promises; what every engine promises is in with_engine/."""

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.inference.engine import Completion, Generation, Request, complete
from sg4v_ray.inference.fake import MAX_TOKENS, MIN_TOKENS
from sg4v_ray.inference.open import EngineConfig, open_engine

IMAGE, EOS = 4, 2
WORDS = {"\u0120red": 10, "circle": 11, "\u2581blue": 12}
OTHERS = {"<s>": 1, "</s>": EOS, "<image>": IMAGE, "\u0120": 13, "!": 14, "\u00e9": 15, "abc": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "vision_config": {"image_size": 16, "patch_size": 8},
        "text_config": {"vocab_size": 32, "max_position_embeddings": 256, "eos_token_id": EOS},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def _with_tokenizer(folder: Path) -> Path:
    tokenizer = {
        "added_tokens": [{"id": 1}, {"id": EOS}, {"id": IMAGE}, {"id": 16}],
        "model": {"vocab": WORDS | OTHERS},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def _answers(folder: Path, requests: list[Request], *, latency_s: float = 0.0) -> list[Completion]:
    config = EngineConfig(kind="fake", capacity=2, max_model_len=256, latency_s=latency_s)

    async def run() -> list[Completion]:
        engine = open_engine(config, folder, threads=1)
        await engine.start()
        answers = await asyncio.gather(*(complete(engine, one) for one in requests))
        await engine.close()
        return answers

    return asyncio.run(run())


def _request(level: int = 0, *, word: int = 10, max_tokens: int = 100, seed: int = 0) -> Request:
    return Request(
        token_ids=(1, IMAGE, word),
        images=(np.full((16, 16, 3), level, np.uint8),),
        generation=Generation(max_tokens=max_tokens, temperature=1.0, seed=seed),
    )


def test_it_speaks_in_words_of_the_tokenizer(folder: Path) -> None:
    (answer,) = _answers(_with_tokenizer(folder), [_request()])
    assert set(answer.token_ids[:-1]) <= set(WORDS.values())
    assert answer.token_ids[-1] == EOS
    assert answer.finish_reason == "stop"


def test_without_a_tokenizer_it_avoids_the_special_ids(folder: Path) -> None:
    answers = _answers(folder, [_request(level) for level in range(30)])
    said = {token for one in answers for token in one.token_ids[:-1]}
    assert said <= set(range(3, 32)) - {IMAGE}


def test_answers_have_the_documented_lengths(folder: Path) -> None:
    lengths = {len(one.token_ids) - 1 for one in _answers(folder, [*map(_request, range(40))])}
    assert min(lengths) >= MIN_TOKENS
    assert max(lengths) <= MAX_TOKENS


def test_an_answer_depends_on_the_prompt_the_pixels_and_the_settings_and_on_nothing_else(
    folder: Path,
) -> None:
    requests = [_request(), _request(1), _request(word=11), _request(seed=1)]
    answers = _answers(folder, requests)
    assert len({one.token_ids for one in answers}) == 4
    assert _answers(folder, requests[::-1]) == answers[::-1]


def test_fewer_tokens_are_the_beginning_of_more(folder: Path) -> None:
    short, long = _answers(folder, [_request(max_tokens=3), _request()])
    assert short.token_ids == long.token_ids[:3]
    assert (short.finish_reason, long.finish_reason) == ("length", "stop")


def test_a_step_takes_the_set_latency_for_the_whole_batch(folder: Path) -> None:
    begin = time.perf_counter()
    _answers(folder, [_request(level, max_tokens=5) for level in range(4)], latency_s=0.02)
    # Two batches of two rows: ten steps, not twenty.
    assert time.perf_counter() - begin >= 10 * 0.02


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="of type 'llama', expected 'llava'"):
        _answers(tmp_path, [])
