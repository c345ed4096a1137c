# SPDX-License-Identifier: Apache-2.0
"""A wrong stage fails at construction, and a right one reaches DeepSpeed as meant."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model.config import nano
from sg4v_ray.model.freeze import PRETRAIN
from sg4v_ray.model.weights import create
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.deepspeed import groups, move_buffers, settings

pytestmark = pytest.mark.training

STAGE = StageConfig(
    kind="pretrain",
    template="plain",
    geometry="square",
    trainable=PRETRAIN,
    learning_rate=2e-5,
    global_batch=256,
    micro_batch=16,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 0}, "global_batch must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"micro_batch": 7}, "global_batch 256 is no multiple of micro_batch 7"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be between 0 and 1"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"micro_tokens": 9, "length_window": 0}, "length_window must be .* above 0 with micro_t"),
        ({"spike_factor": 1.0}, "spike_factor must be above 1, got 1.0"),
        ({"rollback_after_skips": 0}, "rollback_after_skips must be at least 1"),
        ({"vision_layer_decay": 0.0}, "vision_layer_decay must be above 0"),
        ({"zero_stage": 0}, "zero_stage 0 keeps no float32 copy"),
        ({"export_checkpoint": "best"}, "'best' needs held_out_every_steps, got None; set it"),
    ],
)
def test_a_wrong_number_is_named_at_construction(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(STAGE, **change)


def test_what_accumulates_is_what_the_workers_do_not_hold_at_once() -> None:
    assert settings(STAGE, world_size=4, gpu=True)["gradient_accumulation_steps"] == 4
    assert settings(STAGE, world_size=16, gpu=True)["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_precision_sharding_and_clipping_reach_deepspeed(zero_stage: int) -> None:
    made = settings(replace(STAGE, zero_stage=zero_stage), world_size=16, gpu=True)
    assert made["zero_optimization"]["stage"] == zero_stage
    assert made["bf16"] == {"enabled": True}
    assert made["gradient_clipping"] == 0.0, "published: not clipped"
    clipped = replace(STAGE, clip_norm=0.5, dtype="float32")
    made = settings(clipped, world_size=16, gpu=False)
    assert made["bf16"] == {"enabled": False}
    assert made["gradient_clipping"] == 0.5
    assert made["optimizer"]["params"]["torch_adam"] is True
    assert "fused" not in made["optimizer"]["params"]


def test_only_trained_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].requires_grad_(False)
    made = groups(model.named_parameters(), weight_decay=0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in made] == [(0.1, 1), (0.0, 3)]
    assert {group["scale"] for group in made} == {1.0}


def test_the_first_blocks_of_a_tower_learn_least() -> None:
    tower = "model.vision_tower.encoder.layers"
    names = (f"{tower}.0.a", f"{tower}.2.a", "model.vision_tower.pre_layrnorm.a", "lm_head.a")
    named = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in names]
    made = groups(named, weight_decay=0.0, vision_layer_decay=0.5)
    scales = {id(one): group["scale"] for group in made for one in group["params"]}
    assert [scales[id(one)] for _, one in named] == [0.125, 0.5, 0.0625, 1.0]


def test_gpus_get_torchs_fused_adamw_which_is_not_compiled_at_the_first_start() -> None:
    params = settings(STAGE, world_size=16, gpu=True)["optimizer"]["params"]
    assert (params["torch_adam"], params["fused"]) == (True, True)


def test_what_is_no_parameter_goes_to_the_device_too() -> None:
    model = create(nano(400), seed=0)
    kept = {name for name, _ in model.named_buffers()}
    assert kept, "positions of the tower, frequencies of the language model"
    move_buffers(model, torch.device("meta"))
    assert {name for name, one in model.named_buffers() if one.device.type == "meta"} == kept
