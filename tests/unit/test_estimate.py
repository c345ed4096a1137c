# SPDX-License-Identifier: Apache-2.0
"""What a stage takes: what fits, what does not and with which change it does; hours and dollars."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from jobs import estimate as job
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model import weights
from sg4v_ray.model.config import ModelConfig, llava_7b, llava_13b, nano
from sg4v_ray.model.freeze import FINETUNE, PRETRAIN, freeze
from sg4v_ray.model.size import count_parameters, count_trainable
from sg4v_ray.recipes import sharegpt4v
from sg4v_ray.recipes.sharegpt4v import DATA, RUNS, STAGES, planned
from sg4v_ray.recipes.teacher import GPT_4O_PRICES
from sg4v_ray.training.cluster import KNOWN_GPUS, Cluster, captioning, teacher_captions
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.deepspeed import settings
from sg4v_ray.training.estimate import (
    BUCKET,
    LIVE_PARAMETERS,
    Estimate,
    busy_micro_batch,
    estimate,
    memory_of,
    mfu_of,
)

pytestmark = pytest.mark.training

PAPER = Cluster(gpu="A100-80G", gpus_per_node=8, nodes=2)


# Memory


def _sum(tensors: Any) -> int:
    return sum(one.untyped_storage().nbytes() for one in tensors)


def test_weights_gradients_and_optimizer_are_those_of_a_step() -> None:
    config, plan = nano(), replace(PRETRAIN, vision_from_block=1)
    model = weights.create(config, seed=0)
    freeze(model, plan)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.tensor([[1, *[config.image_token_id] * config.num_image_tokens, 50, 51, 2]])
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    optimizer.step()
    stage = replace(_stage("pretrain"), trainable=plan, dtype="float32", zero_stage=0)
    memory = memory_of(stage, config, Cluster(nodes=1, gpus_per_node=1))
    assert memory.weights == _sum(model.parameters())
    assert memory.gradients == _sum(one.grad for one in trained)
    states = [one for state in optimizer.state.values() for one in state.values()]
    assert memory.optimizer == pytest.approx(_sum(states), rel=0.001)  # steps are counted too
    assert memory.buffers == 0


def test_each_zero_stage_shards_one_part_more() -> None:
    parts = [
        memory_of(replace(_stage("pretrain"), zero_stage=zero), llava_7b(), PAPER)
        for zero in (1, 2, 3)
    ]
    whole = count_trainable(llava_7b(), PRETRAIN).total
    assert [one.optimizer / (12 * whole) for one in parts] == [1 / 16, 1 / 16, 1 / 16]
    assert [one.gradients / (2 * whole) for one in parts] == [1, 1 / 16, 1 / 16]
    every = count_parameters(llava_7b()).total
    assert [one.weights / (2 * every) for one in parts] == [1, 1, 1 / 16]


def test_a_gpu_that_holds_no_whole_model_holds_its_part_of_one() -> None:
    small = Cluster(gpu="small", memory_gb=24, tflops=100, nodes=8)
    found = _estimate("pretrain", small, model=llava_13b(), micro_batch=1)
    assert found.memory.total < small.usable_bytes < 2 * count_parameters(llava_13b()).total
    assert found.fits


def test_text_alone_takes_a_row_more() -> None:
    stage = _stage("finetune")
    with_images, text = (
        memory_of(stage, llava_7b(), PAPER, text_only=one).activations for one in (False, True)
    )
    assert text == pytest.approx(with_images * 9 / 8, rel=0.02)


def test_buffers_are_those_of_the_settings_that_deepspeed_gets() -> None:
    made = settings(_stage("pretrain"), world_size=16, gpu=True)["zero_optimization"]
    assert made["stage3_max_live_parameters"] == LIVE_PARAMETERS
    assert made.get("reduce_bucket_size", DeepSpeedZeroConfig().reduce_bucket_size) == BUCKET
    assert memory_of(_stage("pretrain"), llava_7b(), PAPER).buffers == 2 * (1e9 + 5e8)
    alone = Cluster(nodes=1, gpus_per_node=1)
    assert memory_of(_stage("pretrain"), llava_7b(), alone).buffers == 2 * 5e8
    assert memory_of(_stage("align"), llava_7b(), alone).buffers == 2 * 2 * 5e8


def test_a_cap_of_tokens_caps_the_activations() -> None:
    stage = _stage("pretrain")
    capped = replace(stage, micro_tokens=8 * stage.max_length)
    halved = replace(stage, micro_batch=8)
    kept, half = (memory_of(one, llava_7b(), PAPER).activations for one in (capped, halved))
    assert half <= kept < 1.05 * half, "images are still as many"


# What fits


def _stage(kind: Any) -> StageConfig:
    return STAGES[kind]()


def _estimate(
    kind: Any, cluster: Cluster = PAPER, model: ModelConfig | None = None, **changes: Any
) -> Estimate:
    stage = replace(_stage(kind), **changes)
    return estimate(stage, model or llava_7b(), data=DATA[kind], cluster=cluster, mfu=0.4)


def test_the_papers_runs_fit_their_gpus() -> None:
    for (size, kind), run in RUNS.items():
        if size == "7b":
            cluster = Cluster(gpu=run.gpu, gpus_per_node=8, nodes=run.gpus // 8)
            assert _estimate(kind, cluster).fits, kind


def test_pretraining_does_not_fit_one_gpu_and_only_more_of_them_help() -> None:
    found = _estimate("pretrain", Cluster(nodes=1, gpus_per_node=1))
    assert not found.fits
    assert [one.change for one in found.remedies] == ["4 GPUs (cluster.nodes 4)"]


@pytest.mark.parametrize(
    ("kind", "gpu", "changes", "first_words"),
    [
        pytest.param(
            "pretrain",
            "A100-80G",
            {"gradient_checkpointing": False},
            ["gradient_checkpointing", "micro_batch"],
            id="without checkpointing",
        ),
        pytest.param("align", "L40S-48G", {}, ["micro_batch"], id="large batch"),
        pytest.param(
            "pretrain", "A100-40G", {"zero_stage": 2}, ["micro_batch", "zero_stage"], id="unsharded"
        ),
        pytest.param("pretrain", "A100-40G", {"micro_batch": 32}, ["micro_batch"], id="too much"),
    ],
)
def test_a_remedy_changes_one_setting_and_really_fits(
    kind: str, gpu: str, changes: dict[str, Any], first_words: list[str]
) -> None:
    cluster = Cluster(gpu=gpu)
    before = replace(_stage(kind), **changes)
    found = _estimate(kind, cluster, **changes)
    assert not found.fits
    assert [one.change.split()[0] for one in found.remedies] == first_words
    for one in found.remedies:
        again = estimate(one.stage, llava_7b(), data=DATA[kind], cluster=one.cluster, mfu=0.4)
        assert again.fits
        assert again.memory == one.memory
        changed = [
            name for name in before.__slots__ if getattr(before, name) != getattr(one.stage, name)
        ]
        assert len(changed) + (one.cluster != cluster) == 1


def test_where_no_single_change_is_enough_all_are_taken_together() -> None:
    cluster = Cluster(gpu="A100-40G", nodes=1, gpus_per_node=4)
    found = _estimate("pretrain", cluster, model=llava_13b(), zero_stage=1)
    (remedy,) = found.remedies
    assert remedy.change.startswith("gradient_checkpointing on, micro_batch 1, zero_stage 3")
    assert remedy.memory.total <= remedy.cluster.usable_bytes


def test_what_never_fits_has_no_remedy() -> None:
    small = Cluster(gpu="small", memory_gb=2, tflops=10)
    assert _estimate("pretrain", small).remedies == ()


# Time and money


def test_hours_fall_with_the_gpus_and_dollars_do_not() -> None:
    one, two = (_estimate("pretrain", Cluster(nodes=nodes, gpu_hour_usd=2.0)) for nodes in (1, 2))
    assert one.hours == pytest.approx(2 * two.hours)
    assert one.usd == pytest.approx(two.usd) == pytest.approx(one.hours * 8 * 2)
    assert one.busy == two.busy == 1


def test_gpus_without_a_micro_batch_are_idle_and_a_smaller_one_wakes_them() -> None:
    many = Cluster(nodes=4)
    lazy = _estimate("pretrain", many)
    assert (lazy.busy, busy_micro_batch(_stage("pretrain"), 32)) == (0.5, 8)
    assert lazy.hours == pytest.approx(_estimate("pretrain", PAPER).hours)
    assert _estimate("pretrain", many, micro_batch=8).hours == pytest.approx(lazy.hours / 2)
    assert busy_micro_batch(_stage("pretrain"), 3) is None


def test_the_papers_hours_come_out_at_the_utilisation_derived_from_them() -> None:
    for size in ("7b", "13b"):
        for plan in planned(size):
            run = plan.published
            if run is None:
                continue
            cluster = Cluster(gpu=run.gpu, gpus_per_node=run.gpus, nodes=1)
            found = estimate(
                plan.stage, plan.model, data=plan.data, cluster=cluster, mfu=plan.published_mfu
            )
            assert found.hours == pytest.approx(run.hours)
    assert mfu_of(
        RUNS["7b", "pretrain"], _stage("pretrain"), llava_7b(), DATA["pretrain"]
    ) == pytest.approx(0.186, abs=0.002)


def test_steps_are_the_published_ones() -> None:
    assert _estimate("pretrain").steps == 4_871
    assert _estimate("finetune").steps == 5_196
    assert _estimate("pretrain", max_steps=100).hours < _estimate("pretrain").hours / 48


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.5])
def test_a_utilisation_that_is_no_share_is_refused(mfu: float) -> None:
    with pytest.raises(ConfigError, match="mfu must be above 0 and at most 1"):
        estimate(_stage("align"), llava_7b(), data=DATA["align"], cluster=PAPER, mfu=mfu)


def test_captioning_takes_the_papers_44_days_at_the_papers_rate() -> None:
    rate = sharegpt4v.PUBLISHED_CAPTIONING_RATE
    found = captioning(1_200_000, images_per_gpu_s=rate, cluster=Cluster(gpu_hour_usd=1.0))
    assert found.hours * found.gpus == pytest.approx(44 * 24)
    assert found.usd == pytest.approx(44 * 24)
    with pytest.raises(ConfigError, match="images_per_gpu_s must be above 0"):
        captioning(1, images_per_gpu_s=0, cluster=PAPER)


def test_teacher_captions_cost_their_tokens() -> None:
    found = teacher_captions(1000, prompt_tokens=900, completion_tokens=200, prices=GPT_4O_PRICES)
    assert (found.prompt_tokens, found.completion_tokens) == (900_000, 200_000)
    assert found.usd == pytest.approx(0.9 * 2.5 + 0.2 * 10)
    free = teacher_captions(1000, prompt_tokens=900, completion_tokens=200, prices=None)
    assert free.usd is None


# Clusters


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known are A100-40G, A100-80G, H100-80G, L40S-48G"):
        Cluster(gpu="B200")


def test_another_gpu_needs_its_two_figures() -> None:
    assert Cluster(gpu="B200", memory_gb=180, tflops=2250).kind.memory_gb == 180
    with pytest.raises(ConfigError, match="give memory_gb and tflops"):
        Cluster(gpu="B200", memory_gb=180)
    assert Cluster(gpu="H100-80G", memory_gb=94).kind.tflops == KNOWN_GPUS["H100-80G"].tflops


@pytest.mark.parametrize("field", ["nodes", "gpus_per_node", "memory_gb", "gpu_hour_usd"])
def test_a_cluster_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be above 0"):
        Cluster(**{field: 0})


# Recipes


def test_unlocking_another_block_is_one_number() -> None:
    assert sharegpt4v.pretrain().trainable == PRETRAIN
    other = sharegpt4v.pretrain(vision_from_block=18)
    assert other.trainable.vision_from_block == 18
    assert sharegpt4v.pretrain(vision_from_block=None).trainable == FINETUNE


def test_the_published_stages_have_the_published_values() -> None:
    rows = {kind: make() for kind, make in STAGES.items()}
    assert [one.kind for one in rows.values()] == list(rows)
    assert [one.learning_rate for one in rows.values()] == [1e-3, 2e-5, 2e-5, 2e-5]
    assert [one.global_batch for one in rows.values()] == [256, 256, 256, 128]
    assert [one.micro_batch for one in rows.values()] == [32, 16, 16, 8]
    assert [one.zero_stage for one in rows.values()] == [2, 3, 3, 3]
    assert [one.clip_norm for one in rows.values()] == [None, 1.0, None, None]


# The job


def _run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["estimate", *flags])
    job.run()
    return capsys.readouterr().out


def test_the_job_prints_the_papers_runs_beside_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _run(monkeypatch, capsys, "7b", "--cluster.gpu-hour-usd", "2")
    for words in ("3.5 h on 8", "12 h on 16", "7 h on 16", "44 A100-days", "303,507,456"):
        assert words in text
    assert "Take --micro-batch 16" in text, "align in micro-batches of 32 is for 8 GPUs"


def test_the_job_says_plainly_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--stage", "pretrain", "--cluster.nodes=1", "--cluster.gpus-per-node=1")
    text = _run(monkeypatch, capsys, "7b", *flags)
    assert "pretrain does NOT fit: 134.4 of 72.0 GB. It fits with one of:\n  4 GPUs" in text
    assert "finetune" not in text


@pytest.mark.parametrize("size", ["7b", "13b", "nano"])
def test_json_is_one_object(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(_run(monkeypatch, capsys, size, "--json", "--mfu", "0.4"))
    assert [one["stage"] for one in found["stages"]] == list(STAGES)
    assert {one["mfu"] for one in found["stages"]} == {0.4}
    assert (found["captioning"] is None) == (size == "nano")
