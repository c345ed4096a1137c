# SPDX-License-Identifier: Apache-2.0
"""Each stage trains exactly its parts, and exactly those get a gradient."""

import re

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model import weights
from sg4v_ray.model.config import ModelConfig, llava_7b, nano, to_transformers
from sg4v_ray.model.freeze import (
    ALIGN,
    CAPTIONER,
    FINETUNE,
    PRETRAIN,
    FreezePlan,
    dead_parameters,
    freeze,
    trainable,
)

FROM_SCRATCH = FreezePlan(
    projector=True, language_model=True, vision_from_block=0, vision_embeddings=True
)
PROJECTOR = {
    f"model.multi_modal_projector.linear_{index}.{kind}"
    for index in (1, 2)
    for kind in ("weight", "bias")
}


def _empty(config: ModelConfig) -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        return LlavaForConditionalGeneration(to_transformers(config))


@pytest.fixture(scope="module")
def big() -> LlavaForConditionalGeneration:
    return _empty(llava_7b())


def _blocks(names: set[str]) -> set[int]:
    found = (re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", name) for name in names)
    return {int(one[1]) for one in found if one}


def _language_model(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("model.language_model.", "lm_head."))}


def test_align_trains_the_projector_only(big: LlavaForConditionalGeneration) -> None:
    assert set(trainable(big, ALIGN)) == PROJECTOR


@pytest.mark.parametrize("plan", [PRETRAIN, CAPTIONER])
def test_pretraining_trains_all_but_the_first_half_of_the_vision_tower(
    big: LlavaForConditionalGeneration, plan: FreezePlan
) -> None:
    names, every = set(trainable(big, plan)), {name for name, _ in big.named_parameters()}
    assert _blocks(names) == set(range(12, 23))
    assert _language_model(names) == _language_model(every)
    tower = {name for name in names if "vision_tower" in name}
    assert names == PROJECTOR | _language_model(every) | tower
    assert all(".encoder.layers." in name for name in tower)
    assert len(tower) == 11 * 16


def test_finetuning_freezes_the_vision_tower(big: LlavaForConditionalGeneration) -> None:
    every = {name for name, _ in big.named_parameters()}
    assert set(trainable(big, FINETUNE)) == PROJECTOR | _language_model(every)


def test_the_language_model_means_its_embedding_and_head_too(
    big: LlavaForConditionalGeneration,
) -> None:
    names = set(trainable(big, FINETUNE))
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= names
    assert len(_language_model(names)) == 32 * 9 + 3


def test_block_23_and_post_layernorm_of_clip_l_are_dead(
    big: LlavaForConditionalGeneration,
) -> None:
    dead = set(dead_parameters(big))
    assert _blocks(dead) == {23}
    assert {name for name in dead if "post_layernorm" in name} == {
        "model.vision_tower.post_layernorm.weight",
        "model.vision_tower.post_layernorm.bias",
    }
    assert len(dead) == 16 + 2


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(ALIGN, id="align"),
        pytest.param(FINETUNE, id="finetune"),
        pytest.param(
            FreezePlan(projector=True, language_model=True, vision_from_block=2), id="latter half"
        ),
        pytest.param(FROM_SCRATCH, id="from scratch"),
    ],
)
def test_exactly_what_trains_gets_a_gradient(plan: FreezePlan) -> None:
    model = weights.create(nano(), seed=0)
    names = freeze(model, plan)
    _backward(model)
    assert names == tuple(n for n, one in model.named_parameters() if one.grad is not None)


def test_nothing_but_the_dead_parameters_is_without_a_gradient() -> None:
    model = weights.create(nano(), seed=0)
    _backward(model)
    without = tuple(name for name, one in model.named_parameters() if one.grad is None)
    assert without == dead_parameters(model)
    everything = {name for name, _ in model.named_parameters()}
    assert set(trainable(model, FROM_SCRATCH)) == everything - set(without)


def _backward(model: LlavaForConditionalGeneration) -> None:
    config = nano()
    ids = torch.tensor([[1, *[config.image_token_id] * config.num_image_tokens, 50, 51, 2]])
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()


def test_freezing_twice_leaves_only_the_second_plan() -> None:
    model = weights.create(nano(), seed=0)
    freeze(model, FROM_SCRATCH)
    freeze(model, ALIGN)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == PROJECTOR


def test_a_block_that_gets_no_gradient_cannot_be_the_first_to_train() -> None:
    plan = FreezePlan(
        projector=True, language_model=True, vision_from_block=nano().used_vision_layers
    )
    with pytest.raises(ConfigError, match="only the blocks 0 to 2"):
        trainable(_empty(nano()), plan)


def test_a_plan_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="freezes everything"):
        FreezePlan(projector=False, language_model=False, vision_from_block=None)
