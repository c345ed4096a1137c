# SPDX-License-Identifier: Apache-2.0
"""The shapes are the published ones, and what we compute is what transformers allocates."""

from dataclasses import replace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model.config import ModelConfig, llava_7b, llava_13b, nano, to_transformers
from sg4v_ray.model.size import Parameters, count_parameters


def _allocated(config: ModelConfig) -> Parameters:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(to_transformers(config))
    parts = {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
        "head": model.lm_head,
    }
    return Parameters(
        **{name: sum(one.numel() for one in part.parameters()) for name, part in parts.items()}
    )


@pytest.mark.parametrize(
    "config",
    [
        nano(),
        replace(nano(), text_kv_heads=2),
        llava_7b(),
        llava_13b(),
    ],
    ids=lambda one: f"{one.name}-{one.text_kv_heads}-{one.vocab_size}",
)
def test_the_computed_parameters_are_those_that_transformers_allocates(config: ModelConfig) -> None:
    assert count_parameters(config) == _allocated(config)


def test_llava_7b_has_the_published_sizes() -> None:
    assert count_parameters(llava_7b()) == Parameters(
        vision_tower=303_507_456,
        projector=20_979_712,
        language_model=6_607_343_616 + 64 * 4096,  # Vicuna's 32,000 tokens padded to 32,064
        head=131_072_000 + 64 * 4096,
    )


def test_llava_13b_has_vicuna_13b_behind_the_same_vision_tower() -> None:
    size = count_parameters(llava_13b())
    assert size.vision_tower == count_parameters(llava_7b()).vision_tower
    assert size.language_model + size.head == 13_015_864_320 + 2 * 64 * 5120


def test_nano_is_small_enough_for_a_laptop() -> None:
    assert count_parameters(nano()).total < 5_000_000


def test_an_image_takes_as_many_tokens_as_it_has_patches() -> None:
    assert (llava_7b().num_image_tokens, nano().num_image_tokens) == (576, 64)


def test_features_from_layer_minus_2_leave_the_last_block_unused() -> None:
    assert llava_7b().used_vision_layers == 23
    assert replace(llava_7b(), feature_layer=-1).used_vision_layers == 24


def test_transformers_is_told_all_that_the_published_config_says() -> None:
    config = to_transformers(llava_7b())
    assert config.image_token_index == 32_000
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.text_config.rms_norm_eps == 1e-5
    assert config.text_config.max_position_embeddings == 4096
    assert config.text_config.pad_token_id == 32_001
    assert config.vision_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"patch_size": 7}, "image_size by patch_size: 64 / 7"),
        ({"text_heads": 5}, "text_width by text_heads: 128 / 5"),
        ({"text_kv_heads": 3}, "text_heads by text_kv_heads: 4 / 3"),
        ({"feature_layer": 0}, "feature_layer must be between -4 and -1, got 0"),
        ({"image_token_id": 512}, "image_token_id must be above 2 and below vocab_size 512"),
        ({"pad_token_id": 2}, "pad_token_id must be above 2"),
    ],
)
def test_a_shape_that_cannot_be_built_fails_at_construction(
    change: dict[str, int], names: str
) -> None:
    with pytest.raises(ConfigError, match=names):
        replace(nano(), **change)
