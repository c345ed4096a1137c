# SPDX-License-Identifier: Apache-2.0
"""Configs of every kind that an artifact or the teacher ledger is identified by.

`tests/golden/configs_0_1.json` holds what `core.config.to_plain` of version 0.1.0 made of them.
"""

from typing import Any

from sg4v_ray.captions.bulk import BulkConfig
from sg4v_ray.captions.choose import SampleConfig, Share
from sg4v_ray.captions.collect import CollectConfig
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.captions.score import ScoreConfig
from sg4v_ray.captions.teacher import ImageSent, TeacherConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.dataset import choose
from sg4v_ray.dataset.build import BuildConfig, CaptionsPart, QuestionsPart
from sg4v_ray.dataset.conversations import JsonPart, MixPart
from sg4v_ray.dataset.filter import CaptionFilter
from sg4v_ray.dataset.mixture import MixConfig
from sg4v_ray.evaluation.run import EvaluateConfig
from sg4v_ray.exactly_once.config import GenerateConfig
from sg4v_ray.inference.clip_config import ClipConfig
from sg4v_ray.inference.engine import Generation
from sg4v_ray.model.config import ModelConfig, nano
from sg4v_ray.model.freeze import PRETRAIN
from sg4v_ray.model.importing import ImportConfig
from sg4v_ray.sources.catalogue import PaperImages
from sg4v_ray.sources.drawn_shapes import DrawnShapes
from sg4v_ray.sources.easy_vqa import EasyVqaImages, EasyVqaQuestions
from sg4v_ray.sources.folder import Folder, Glob
from sg4v_ray.sources.index import IndexConfig, QuestionsConfig
from sg4v_ray.sources.llava import LlavaImages
from sg4v_ray.sources.tables import HfDataset, ParquetImages
from sg4v_ray.sources.tars import Tars
from sg4v_ray.sources.urls import UrlList
from sg4v_ray.training.config import Fresh, StageConfig

GENERATE = GenerateConfig(
    template="vicuna_v1",
    generation=Generation(max_tokens=64),
    instruction="Describe the image.",
    cut_off="reject",
)
CAPTIONS = BulkConfig(generate=GENERATE, geometry="pad")
TEACHER = TeacherConfig(model="gpt-4o")
STAGE = StageConfig(
    kind="pretrain",
    template="vicuna_v1",
    geometry="square",
    trainable=PRETRAIN,
    learning_rate=2e-5,
    global_batch=256,
    micro_batch=4,
)
NANO: ModelConfig = nano()

CONFIGS: dict[str, Any] = {
    "captions": CAPTIONS,
    "captions, all changed": BulkConfig(
        generate=GenerateConfig(
            template="plain",
            generation=Generation(
                max_tokens=500,
                temperature=1.0,
                top_p=0.9,
                repetition_penalty=1.5,
                num_beams=3,
                seed=7,
            ),
            instruction=None,
            cut_off="keep",
        ),
        geometry="square",
        quality=QualityConfig(min_words=1, max_phrase_repeats=2, max_word_run=3, language="en"),
        images=ImageLimits(max_bytes=1000, max_pixels=2000),
    ),
    "collection": CollectConfig(
        sample=SampleConfig(shares=(Share(source="coco", prompt="objects-2026-11"),)),
        teacher=TEACHER,
    ),
    "collection, all changed": CollectConfig(
        sample=SampleConfig(
            shares=(
                Share(source="coco", prompt="objects-2026-11", count=5),
                Share(source="sam", prompt="objects-2026-11", count=6),
            ),
            seed=1107,
            aesthetic_rate=0.1,
        ),
        teacher=TeacherConfig(
            model="gpt-4o",
            max_tokens=512,
            temperature=0.5,
            image=ImageSent(format="png", max_side=512, quality=80, detail="low"),
        ),
        quality=QualityConfig(language="en"),
    ),
    "scores": ScoreConfig(clip=ClipConfig()),
    "scores, all changed": ScoreConfig(
        clip=ClipConfig(model="ViT-B-32-quickgelu", weights="/weights/clip.safetensors"),
        evaluation_images=(Ref(name="test-images"), Ref(name="images", version="v2")),
        images=ImageLimits(max_pixels=2000),
    ),
    "evaluation": EvaluateConfig(generate=GENERATE, geometry="pad"),
    "index": IndexConfig(
        sources=(
            Folder(path="/images"),
            Glob(pattern="/images/*.jpg"),
            Tars(shards="/images/*.tar"),
            ParquetImages(files="/images/*.parquet"),
            HfDataset(path="/dataset"),
            LlavaImages(json="/data/llava.json", images="/data"),
            UrlList(path="/urls.txt"),
            PaperImages(name="coco", data_root="/data"),
            EasyVqaImages(split="train", name="easy-vqa"),
            DrawnShapes(num_images=12, seed=7),
        )
    ),
    "index, all changed": IndexConfig(
        sources=(
            Folder(path="/images", name="a"),
            Glob(pattern="/images/*.jpg", name="b"),
            Tars(shards="/images/*.tar", name="c"),
            ParquetImages(
                files="/i/*.parquet", image_column="i", id_column="k", prefixes=("/i",), name="d"
            ),
            HfDataset(path="/dataset", image_column="i", id_column="k", name="e"),
            LlavaImages(json="/data/llava.json", images="/data", name="f"),
            UrlList(path="/urls.txt", prefixes=("/i",), name="g"),
            DrawnShapes(num_images=12, seed=7, name="h"),
        ),
        allow_incomplete=True,
    ),
    "questions": QuestionsConfig(source=EasyVqaQuestions(split="test")),
    "dataset": BuildConfig(parts=(CaptionsPart(captions=Ref(name="captions")),), seed=7),
    "dataset, all changed": BuildConfig(
        parts=(
            CaptionsPart(
                captions=Ref(name="captions", version="v2"),
                only_words=("red", "circle"),
                filter=CaptionFilter(
                    scores=Ref(name="scores"),
                    min_clip_score=0.5,
                    min_worst_clip_score=0.25,
                    max_duplicate_bits=3,
                    max_contamination_bits=4,
                ),
                hold_out=HoldOut(per_source=5, seed=1),
            ),
            CaptionsPart(
                captions=Ref(name="more"), filter=CaptionFilter(scores=Ref(name="scores"))
            ),
            QuestionsPart(questions=Ref(name="questions")),
            JsonPart(json="/data/mix.json", images="/data"),
            MixPart(mix=Ref(name="mix"), images="/data"),
        ),
        seed=7,
    ),
    "mix": MixConfig(sft="/data/sft.json", captions="/data/captions.json", seed=0),
    "mix, all changed": MixConfig(
        sft="/data/sft.json",
        captions="/data/captions.json",
        seed=1,
        take=(choose.Share(source="coco", captions=5), choose.Share(source="sam", captions=6)),
        details="/data/detail.json",
        expect_removed=11,
        allow_missing=True,
        coco_folder="coco/train2017",
        file="other.json",
    ),
    "import": ImportConfig(kind="published"),
    "import, all changed": ImportConfig(
        kind="vicuna-clip",
        template="plain",
        geometry="square",
        dtype="bfloat16",
        feature_layer=-1,
        seed=3,
    ),
    "training": STAGE,
    "model": NANO,
    "fresh model": Fresh(model=NANO, tokenizer_file="/tokenizer.json", seed=3),
}
