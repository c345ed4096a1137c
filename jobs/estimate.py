# SPDX-License-Identifier: Apache-2.0
"""Estimate memory, hours and dollars of captions and training, before any GPU is rented.

python -m jobs.estimate 7b|13b|nano [--stage pretrain] [--cluster.gpu A100-80G] [--cluster.nodes 2]
    [--cluster.gpus-per-node 8] [--cluster.gpu-hour-usd 2.0] [--mfu 0.4] [--json]

Without --mfu each stage is as fast as the published run of its kind; the table says how fast.
"""

import json
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from jobs._cli import main
from jobs._estimate_report import Report, as_json, as_text
from sg4v_ray.recipes import sharegpt4v
from sg4v_ray.recipes.sharegpt4v import Size, planned
from sg4v_ray.recipes.teacher import GPT_4O_PRICES
from sg4v_ray.training.cluster import Cluster, captioning, teacher_captions
from sg4v_ray.training.config import StageConfig, StageKind
from sg4v_ray.training.estimate import estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is estimated."""

    size: tyro.conf.Positional[Size]
    """Which model: the paper's, its larger twin, or the laptop's."""
    stage: StageKind | Literal["all"] = "all"
    """One stage, or all and the captions that they need."""
    cluster: Cluster = Cluster()
    """The GPUs; the default is the paper's."""
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1, in place of the published runs'."""
    micro_batch: int | None = None
    """In place of the recipe's, in every stage."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """In place of the recipe's, in every stage."""
    gradient_checkpointing: bool | None = None
    """In place of the recipe's, in every stage."""
    images: int = sharegpt4v.CAPTIONED_IMAGES
    """Images for the captioner."""
    images_per_gpu_s: float = sharegpt4v.PUBLISHED_CAPTIONING_RATE
    """Captions a second and GPU, measured by you. The default is the paper's."""
    json: bool = False
    """Print one JSON object in place of the tables."""


def report(settings: Settings) -> Report:
    """Estimate what the settings ask for."""
    cluster = settings.cluster
    wanted = [one for one in planned(settings.size) if settings.stage in ("all", one.stage.kind)]
    plans = tuple(replace(one, stage=_changed(one.stage, settings)) for one in wanted)
    estimates = tuple(
        estimate(
            one.stage,
            one.model,
            data=one.data,
            cluster=cluster,
            mfu=one.published_mfu if settings.mfu is None else settings.mfu,
        )
        for one in plans
    )
    teacher = teacher_captions(
        sharegpt4v.TEACHER_IMAGES,
        prompt_tokens=sharegpt4v.TEACHER_PROMPT_TOKENS,
        completion_tokens=sharegpt4v.CAPTION_TOKENS,
        prices=GPT_4O_PRICES,
    )
    bulk = captioning(settings.images, images_per_gpu_s=settings.images_per_gpu_s, cluster=cluster)
    with_captions = settings.stage == "all" and settings.size != "nano"
    return Report(
        cluster=cluster,
        stages=tuple(zip(plans, estimates, strict=True)),
        teacher=teacher if with_captions else None,
        captioning=bulk if with_captions else None,
    )


def _changed(stage: StageConfig, settings: Settings) -> StageConfig:
    return replace(
        stage,
        micro_batch=stage.micro_batch if settings.micro_batch is None else settings.micro_batch,
        zero_stage=stage.zero_stage if settings.zero_stage is None else settings.zero_stage,
        gradient_checkpointing=stage.gradient_checkpointing
        if settings.gradient_checkpointing is None
        else settings.gradient_checkpointing,
    )


def run() -> None:
    """Run the estimate with the flags of this process."""
    settings = tyro.cli(Settings, description=__doc__)
    found = report(settings)
    print(json.dumps(as_json(found)) if settings.json else as_text(found))


if __name__ == "__main__":
    main(run, stopped="nothing was started")
