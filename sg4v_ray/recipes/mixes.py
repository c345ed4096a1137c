# SPDX-License-Identifier: Apache-2.0
"""Instruction data: LLaVA's with a teacher's captions in it, and any LLaVA JSON as it is.

The paths are flags: `python -m jobs.mix_dataset sft-mix-published --help`.
"""

from sg4v_ray.core.artifact import Ref
from sg4v_ray.dataset.build import BuildConfig
from sg4v_ray.dataset.conversations import JsonPart, MixPart
from sg4v_ray.dataset.details import NUM_DETAILS
from sg4v_ray.dataset.mixture import PUBLISHED, MixConfig
from sg4v_ray.recipes.line import DatasetStep, Line, MixStep

MIX, SFT_DATA = Ref(name="sft-mix"), Ref(name="sft-data")
SEED = 7
PUBLISHED_NAME = "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"


def _line(config: MixConfig) -> Line:
    part = MixPart(mix=MIX, images="/data")
    data = DatasetStep(config=BuildConfig(parts=(part,), seed=SEED), out=SFT_DATA)
    return Line(mix=MixStep(config=config, out=MIX), datasets=(data,))


def published() -> Line:
    """Mix 23,000 GPT4-Vision captions into LLaVA's 665K as published: --config.sft, .captions."""
    return _line(
        MixConfig(
            sft="/data/llava_v1_5_mix665k.json",
            captions="/data/sharegpt4v_instruct_gpt4-vision_cap100k.json",
            seed=SEED,
            take=PUBLISHED,
            expect_removed=NUM_DETAILS,
            file=PUBLISHED_NAME,
        )
    )


def equal() -> Line:
    """Replace each detailed caption of LLaVA's 665K by one of yours: --config.sft, .captions."""
    return _line(
        MixConfig(
            sft="/data/llava_v1_5_mix665k.json",
            captions="/data/llava.json",
            seed=SEED,
            expect_removed=NUM_DETAILS,
        )
    )


def llava_data() -> Line:
    """Make training data of a LLaVA JSON: --step.0.config.parts.0.json and .images."""
    part = JsonPart(json="/data/llava.json", images="/data")
    config = BuildConfig(parts=(part,), seed=SEED)
    return Line(datasets=(DatasetStep(config=config, out=SFT_DATA),))
