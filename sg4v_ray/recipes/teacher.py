# SPDX-License-Identifier: Apache-2.0
"""Teacher captions as the paper collected them: which images, which prompts, which teacher."""

from typing import Final

from sg4v_ray.captions.choose import SampleConfig, Share
from sg4v_ray.captions.collect import CollectConfig
from sg4v_ray.captions.prompts import (
    ARTWORK_2026_11,
    CELEBRITY_2026_11,
    LANDMARK_2026_11,
    OBJECTS_2026_11,
    TEXT_2026_11,
    WEB_2026_11,
    Prompt,
)
from sg4v_ray.captions.teacher import Endpoint, TeacherConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.price import PriceTable
from sg4v_ray.core.rate import Limits
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.recipes.line import CollectStep
from sg4v_ray.sources.catalogue import PaperSourceName

SEED: Final = 1107

GPT_4O: Final = "gpt-4o-2024-11-20"
"""Ours: the paper's gpt-4-vision-preview was withdrawn; this is its class."""
GPT_4O_PRICES: Final = PriceTable(input_usd_per_mtok=2.5, output_usd_per_mtok=10.0)
"""List prices of 2024-11. Look them up before you pay: only what stands here is counted."""

# Source: the paper, appendix A: 50K COCO, 30K LCS, 20K SAM, 500 each of the rest.
_COMPOSITION: Final[dict[PaperSourceName, tuple[int, Prompt]]] = {
    "coco": (50_000, OBJECTS_2026_11),
    "lcs": (30_000, OBJECTS_2026_11),
    "sam": (20_000, OBJECTS_2026_11),
    "textcaps": (500, TEXT_2026_11),
    "wikiart": (500, ARTWORK_2026_11),
    "web-landmark": (500, LANDMARK_2026_11),
    "web-celebrity": (500, CELEBRITY_2026_11),
}

PAPER_SAMPLE: Final = SampleConfig(
    shares=tuple(
        Share(source=source, prompt=asked.name, count=count)
        for source, (count, asked) in _COMPOSITION.items()
    ),
    seed=SEED,
    # Ours: the paper asks a part of the images for aesthetics and does not say how large.
    aesthetic_rate=0.1,
)


def collect_step(images: Ref, sample: SampleConfig) -> CollectStep:
    """Ask an OpenAI model; endpoint, model, prices, limits and cap are flags.

    Limits are ours and modest: an account's page says what it may.
    """
    return CollectStep(
        config=CollectConfig(sample=sample, teacher=TeacherConfig(model=GPT_4O)),
        endpoint=Endpoint(
            base_url="https://api.openai.com/v1",
            prices=GPT_4O_PRICES,
            limits=Limits(requests_per_min=500, tokens_per_min=800_000, in_flight=64),
        ),
        images=images,
        out=Ref(name="teacher-captions"),
        batching=Batching(rows_per_part=256, rows_per_task=32),
    )


def of_source(name: str) -> SampleConfig:
    """All images of one source, with the prompt for images from anywhere."""
    return SampleConfig(shares=(Share(source=name, prompt=WEB_2026_11.name),), seed=SEED)
