# SPDX-License-Identifier: Apache-2.0
"""All recipes by the name that the command line knows."""

from collections.abc import Callable, Mapping
from typing import Final

from sg4v_ray.recipes import easy_vqa, mixes, paper, sources
from sg4v_ray.recipes.line import Line

RECIPES: Final[Mapping[str, Callable[[], Line]]] = {
    "demo": easy_vqa.demo,
    "folder": sources.folder,
    "glob": sources.glob,
    "tars": sources.tars,
    "parquet": sources.parquet,
    "hf-dataset": sources.hf_dataset,
    "llava-json": sources.llava_json,
    "urls": sources.urls,
    "paper-images": sources.paper_images,
    "sft-mix-published": mixes.published,
    "sft-mix-equal": mixes.equal,
    "llava-data": mixes.llava_data,
    "sharegpt4v": paper.sharegpt4v_line,
    "easy-vqa": easy_vqa.easy_vqa,
    "easy-vqa-one-word": easy_vqa.easy_vqa_one_word,
    "easy-vqa-no-pretraining": easy_vqa.easy_vqa_no_pretraining,
}
