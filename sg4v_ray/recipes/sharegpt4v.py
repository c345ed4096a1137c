# SPDX-License-Identifier: Apache-2.0
"""The paper's training stages, every value with its source, and what they train on.

Sources, where a line names none:
    stage 0 (align): haotian-liu/LLaVA, scripts/v1_5/pretrain.sh and README;
    pretrain, finetune: ShareGPT4Omni/ShareGPT4V@b6f70e9, scripts/sharegpt4v/slurm_pretrain_7b.sh
    and slurm_finetune_7b.sh. The 13B scripts differ in the base
    model only, so a stage is the same for both.

`StageConfig`'s defaults are the rest of these scripts: cosine after a warm-up of 0.03, bf16, AdamW
without weight decay, activation checkpointing, 2,048 tokens, one epoch, no clipping. Ours: rows are
sorted by length (`length_window`), and checkpoints are written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from sg4v_ray.model.config import ModelConfig, llava_7b, llava_13b, nano
from sg4v_ray.model.freeze import ALIGN, CAPTIONER, FINETUNE, PRETRAIN, FreezePlan
from sg4v_ray.recipes import easy_vqa
from sg4v_ray.training.config import StageConfig, StageKind
from sg4v_ray.training.estimate import Data, Run, mfu_of

Size = Literal["7b", "13b", "nano"]
_SPIKE: Final = 3.0
"""Ours: a loss of three medians is no part of a healthy run on captions. Fine-tuning has none:
steps of text alone have losses of their own."""


def align() -> StageConfig:
    """Stage 0, LLaVA-1.5's: only the projector learns. 8 GPUs x 32."""
    return StageConfig(
        kind="align",
        template="plain",
        geometry="square",
        trainable=ALIGN,
        learning_rate=1e-3,
        global_batch=256,
        micro_batch=32,
        zero_stage=2,
    )


def captioner() -> StageConfig:
    """Share-Captioner's training, ours: nothing of the published one is known but its 100K images.

    Batch, rate and freezing are those of `pretrain`. The template and geometry are those that
    it will be asked with. Clipping is ours too: losses were seen to jump where a tower trains
    (InternLM-XComposer issue 106).
    """
    return StageConfig(
        kind="captioner",
        template="vicuna_v1",
        geometry="pad",
        trainable=CAPTIONER,
        learning_rate=2e-5,
        spike_factor=_SPIKE,
        global_batch=256,
        micro_batch=16,
        zero_stage=3,
        clip_norm=1.0,
    )


def pretrain(vision_from_block: int | None = PRETRAIN.vision_from_block) -> StageConfig:
    """Stage 1: language model, projector and the latter half of the tower. 16 GPUs x 16.

    Args:
        vision_from_block: first vision block that trains; the paper's table 6 has 0, 6, 12, 18,
            and 24, a frozen tower, which is None here.
    """
    return StageConfig(
        kind="pretrain",
        template="plain",
        geometry="square",
        trainable=FreezePlan(
            projector=True, language_model=True, vision_from_block=vision_from_block
        ),
        learning_rate=2e-5,
        spike_factor=_SPIKE,
        global_batch=256,
        micro_batch=16,
        zero_stage=3,
    )


def finetune() -> StageConfig:
    """Stage 2: language model and projector. 16 GPUs x 8."""
    return StageConfig(
        kind="finetune",
        template="vicuna_v1",
        geometry="pad",
        trainable=FINETUNE,
        learning_rate=2e-5,
        global_batch=128,
        micro_batch=8,
        zero_stage=3,
    )


TEACHER_IMAGES: Final = 102_025
"""Records of sharegpt4v_instruct_gpt4-vision_cap100k.json."""
CAPTIONED_IMAGES: Final = 1_246_901
"""Records of share-captioner_coco_lcs_sam_1246k_1107.json."""
PUBLISHED_CAPTIONING_RATE: Final = 1_200_000 / (44 * 24 * 3600)
"""Images a second and GPU: 1.2M in 44 A100 GPU-days (the paper, section 3.3)."""
TEACHER_PROMPT_TOKENS: Final = 765 + 160
"""Mean of a request: an image of 1,024 x 768 in detail `high` (core.price.ImageTokens), and the
text of captions/prompts.py."""
CAPTION_TOKENS: Final = 942 / 4.4
"""Mean of a teacher's caption: 942 characters (the paper, section 3.2), 4.4 a token."""

_FINETUNE_SAMPLES: Final = 665_058
_TEXT_ONLY: Final = 40_688
"""ShareGPT conversations of LLaVA's mix (LLaVA issue 702)."""

DATA: Final[Mapping[StageKind, Data]] = MappingProxyType(
    {
        # LCS-558K. BLIP's captions have 54 characters (the paper, table 1).
        "align": Data(samples=558_128, text_tokens=15),
        # Ours: a caption of 942 characters, and the question in the template of vicuna_v1.
        "captioner": Data(samples=TEACHER_IMAGES, text_tokens=270),
        # Captions have 826 characters (the paper, table 1), 180 to 200 tokens of Llama.
        "pretrain": Data(samples=CAPTIONED_IMAGES, text_tokens=190),
        # Ours: 240 tokens beside an image, 900 in a conversation without one.
        "finetune": Data(
            samples=_FINETUNE_SAMPLES,
            text_tokens=240 + (900 - 240) * _TEXT_ONLY / _FINETUNE_SAMPLES,
            images=1 - _TEXT_ONLY / _FINETUNE_SAMPLES,
        ),
    }
)
NANO_DATA: Final[Mapping[StageKind, Data]] = MappingProxyType(
    {
        # Recipe easy-vqa: 4,000 teacher captions, 20,000 captions, and 38,575 questions about
        # 4,000 images. Tokens of its own tokenizer: 127 in an image's questions (2026-11); a
        # caption's are assumed.
        "align": Data(samples=4_000, text_tokens=5),
        "captioner": Data(samples=4_000, text_tokens=75),
        "pretrain": Data(samples=20_000, text_tokens=40),
        "finetune": Data(samples=4_000, text_tokens=28 + 127),
    }
)
RUNS: Final[Mapping[tuple[Size, StageKind], Run]] = MappingProxyType(
    {
        ("7b", "align"): Run(gpu="A100-80G", gpus=8, hours=3.5),  # LLaVA's README
        ("13b", "align"): Run(gpu="A100-80G", gpus=8, hours=5.5),  # LLaVA's README
        ("7b", "pretrain"): Run(gpu="A100-80G", gpus=16, hours=12),  # ShareGPT4V's README
        ("7b", "finetune"): Run(gpu="A100-80G", gpus=16, hours=7),  # ShareGPT4V's README
    }
)
"""Published runs. Those of ShareGPT4V-13B were not."""

STAGES: Final[Mapping[StageKind, Callable[[], StageConfig]]] = MappingProxyType(
    {
        "align": align,
        "captioner": captioner,
        "pretrain": pretrain,
        "finetune": finetune,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A stage, what it trains on, and how fast others were."""

    stage: StageConfig
    model: ModelConfig
    data: Data
    published: Run | None
    """The run of the same stage and size."""
    published_mfu: float
    """Of that run; without one, of the 7B run of the same stage, or else of pretraining."""


def planned(size: Size) -> tuple[Planned, ...]:
    """Return the four stages of a size in their order."""
    return tuple(
        Planned(
            stage=stage,
            model=_MODELS[size](),
            data=(NANO_DATA if size == "nano" else DATA)[stage.kind],
            published=RUNS.get((size, stage.kind)),
            published_mfu=published_mfu(size, stage.kind),
        )
        for stage in _stages(size)
    )


def published_mfu(size: Size, kind: StageKind) -> float:
    """Return the model FLOPs utilisation of the published run that is nearest to this stage."""
    keys: tuple[tuple[Size, StageKind], ...] = ((size, kind), ("7b", kind), ("7b", "pretrain"))
    at, of = next(key for key in keys if key in RUNS)
    stage = STAGES[of]()
    return mfu_of(RUNS[at, of], stage, _MODELS[at](), DATA[of])


_MODELS: Final[Mapping[Size, Callable[[], ModelConfig]]] = MappingProxyType(
    {"7b": llava_7b, "13b": llava_13b, "nano": nano}
)


def _stages(size: Size) -> list[StageConfig]:
    if size == "nano":
        line = easy_vqa.easy_vqa()
        steps = (line.align, line.captioner, line.pretrain, line.finetune)
        return [step.config for step in steps if step is not None]
    return [make() for make in STAGES.values()]
