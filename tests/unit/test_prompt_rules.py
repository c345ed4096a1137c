# SPDX-License-Identifier: Apache-2.0
"""Engines read what they must know from the folder, also where transformers leaves it out."""

import json
from pathlib import Path
from typing import Any

import pytest

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.prompt import PromptRules


def test_the_published_config_leaves_out_what_is_llamas_default(tmp_path: Path) -> None:
    # As in llava-hf/llava-1.5-7b-hf.
    published = {
        "model_type": "llava",
        "image_token_index": 32_000,
        "pad_token_id": 32_001,
        "text_config": {"vocab_size": 32_064, "max_position_embeddings": 4096},
        "vision_config": {"image_size": 336, "patch_size": 14},
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert PromptRules.read(tmp_path, max_model_len=2048) == PromptRules(
        image_token=32_000,
        image_size=336,
        num_image_tokens=576,
        eos_token=2,
        pad_token=32_001,
        vocab_size=32_064,
        max_len=2048,
    )


def test_a_placeholder_becomes_one_token_for_each_feature_in_its_place() -> None:
    rules = PromptRules(
        image_token=9,
        image_size=16,
        num_image_tokens=4,
        eos_token=2,
        pad_token=3,
        vocab_size=32,
        max_len=64,
    )
    assert rules.expand((1, 9, 5, 9)) == [1, 9, 9, 9, 9, 5, 9, 9, 9, 9]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be between 0 and 2, got -0.1"),
        ({"temperature": 2.1}, "temperature must be between 0 and 2, got 2.1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_that_some_engine_would_refuse_fail_at_construction(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Generation(**{"max_tokens": 8, **settings})
