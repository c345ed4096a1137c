# SPDX-License-Identifier: Apache-2.0
"""The whole system in miniature, on a laptop: real public images, a nano model, a local teacher.

Three things differ from the paper. Nothing is pretrained at this size, so the vision tower starts
from nothing and trains whole wherever the paper trains its latter half. For the same reason the
align stage, which there trains a projector between a pretrained tower and a pretrained language
model, trains everything here, on teacher captions cut down to their colour and shape words: it
stands in for what the paper takes as given. And the teacher is a program that reads pixels
(`easy_vqa_teacher`), reached over HTTP like any other.

The learning rates, batches and steps are ours, found by trial on drawn images.
"""

from dataclasses import replace
from typing import Any

from sg4v_ray.captions.bulk import BulkConfig
from sg4v_ray.captions.choose import SampleConfig, Share
from sg4v_ray.captions.collect import CollectConfig
from sg4v_ray.captions.prompts import DETAILED_2026_11
from sg4v_ray.captions.teacher import Endpoint, ImageSent, TeacherConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.rate import Limits
from sg4v_ray.dataset.build import BuildConfig, CaptionsPart, QuestionsPart
from sg4v_ray.evaluation.run import EvaluateConfig
from sg4v_ray.exactly_once.config import Batching, GenerateConfig
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.config import nano
from sg4v_ray.model.freeze import FreezePlan
from sg4v_ray.model.instructions import UNIFIED
from sg4v_ray.recipes import nano_tokenizer
from sg4v_ray.recipes.embedded import CAPTIONER as EMBEDDED
from sg4v_ray.recipes.line import (
    CaptionStep,
    CollectStep,
    DatasetStep,
    EvaluateStep,
    IndexStep,
    Line,
    QuestionsStep,
    TrainStep,
)
from sg4v_ray.sources.drawn_shapes import DrawnShapes
from sg4v_ray.sources.easy_vqa import EasyVqaImages, EasyVqaQuestions
from sg4v_ray.sources.index import IndexConfig, QuestionsConfig
from sg4v_ray.sources.shapes import COLORS, SHAPES
from sg4v_ray.training.config import Fresh, StageConfig, StageKind

SEED = 7

TRAIN_IMAGES, TEST_IMAGES = Ref(name="images"), Ref(name="test-images")
TRAIN_QUESTIONS, TEST_QUESTIONS = Ref(name="questions"), Ref(name="test-questions")
TEACHER_CAPTIONS = Ref(name="teacher-captions")
CAPTIONER, CAPTIONS = Ref(name="captioner"), Ref(name="captions")
ALIGNED, PRETRAINED, VLM = Ref(name="aligned"), Ref(name="pretrained"), Ref(name="vlm")
ALIGN_DATA, CAPTIONER_DATA = Ref(name="align-data"), Ref(name="captioner-data")
PRETRAIN_DATA, FINETUNE_DATA = Ref(name="pretrain-data"), Ref(name="finetune-data")

WHOLE = FreezePlan(projector=True, language_model=True, vision_from_block=0, vision_embeddings=True)
"""Everything trains: there is no pretrained tower whose first half one would keep."""
TOWER_FROZEN = FreezePlan(projector=True, language_model=True, vision_from_block=None)

ENGINE = EngineConfig(kind="hf", dtype="float32", capacity=64, max_model_len=512)
BATCHING = Batching(rows_per_part=500, rows_per_task=32)


def _stage(kind: StageKind, **changes: Any) -> StageConfig:
    """Return a stage of the nano: float32, because CPUs without bf16 units crawl in bf16."""
    common: dict[str, Any] = {
        "template": "vicuna_v1",
        "geometry": "pad",
        "trainable": WHOLE,
        "global_batch": 16,
        "micro_batch": 8,
        "length_window": 0,  # rows are about equally long
        "betas": (0.9, 0.98),
        "clip_norm": 1.0,
        "max_length": 512,
        "dtype": "float32",
        "zero_stage": 2,
        "gradient_checkpointing": False,
        "save_every_steps": 400,
        "seed": SEED,
    }
    return StageConfig(kind=kind, **{**common, **changes})


def caption_step(images: Ref, captioner: Ref, out: Ref) -> CaptionStep:
    """Caption an index with a nano captioner, greedily, on CPUs."""
    return CaptionStep(
        config=BulkConfig(
            generate=GenerateConfig(
                template="vicuna_v1",
                generation=Generation(max_tokens=64),
                instruction=UNIFIED,
                cut_off="reject",
            ),
            geometry="pad",
        ),
        engine=ENGINE,
        images=images,
        captioner=captioner,
        out=out,
        batching=BATCHING,
    )


def _evaluate_step(model: Ref, suffix: str) -> EvaluateStep:
    return EvaluateStep(
        config=EvaluateConfig(
            generate=GenerateConfig(
                template="vicuna_v1",
                generation=Generation(max_tokens=8),
                instruction=None,
                cut_off="keep",
            ),
            geometry="pad",
        ),
        engine=ENGINE,
        questions=TEST_QUESTIONS,
        train_questions=TRAIN_QUESTIONS,
        model=model,
        out=Ref(name=f"predictions{suffix}"),
        scores=Ref(name=f"scores{suffix}"),
        report=f"scores{suffix}.json",
        batching=BATCHING,
    )


def _images() -> tuple[IndexStep, ...]:
    train = IndexConfig(
        sources=(
            EasyVqaImages(split="train", name="easy-vqa"),
            DrawnShapes(num_images=16_000, seed=SEED, name="drawn"),
        )
    )
    test = IndexConfig(sources=(EasyVqaImages(split="test", name="easy-vqa-test"),))
    return IndexStep(config=train, out=TRAIN_IMAGES), IndexStep(config=test, out=TEST_IMAGES)


def _questions() -> tuple[QuestionsStep, ...]:
    train = QuestionsConfig(source=EasyVqaQuestions(split="train"))
    test = QuestionsConfig(source=EasyVqaQuestions(split="test"))
    return (
        QuestionsStep(config=train, images=TRAIN_IMAGES, out=TRAIN_QUESTIONS),
        QuestionsStep(config=test, images=TEST_IMAGES, out=TEST_QUESTIONS),
    )


def _datasets() -> tuple[DatasetStep, ...]:
    parts = (
        (ALIGN_DATA, CaptionsPart(captions=TEACHER_CAPTIONS, only_words=(*COLORS, *SHAPES))),
        (CAPTIONER_DATA, CaptionsPart(captions=TEACHER_CAPTIONS)),
        (PRETRAIN_DATA, CaptionsPart(captions=CAPTIONS)),
        (FINETUNE_DATA, QuestionsPart(questions=TRAIN_QUESTIONS)),
    )
    return tuple(
        DatasetStep(config=BuildConfig(parts=(part,), seed=SEED), out=out) for out, part in parts
    )


def _pretrain(dataset: Ref, out: Ref) -> TrainStep:
    config = _stage("pretrain", template="plain", geometry="square", learning_rate=4e-4, epochs=2.0)
    return TrainStep(config=config, start=ALIGNED, dataset=dataset, out=out)


def _finetune(start: Ref, out: Ref, trainable: FreezePlan = TOWER_FROZEN) -> TrainStep:
    config = _stage("finetune", learning_rate=4e-4, trainable=trainable, epochs=5.0)
    return TrainStep(config=config, start=start, dataset=FINETUNE_DATA, out=out)


def easy_vqa() -> Line:
    """The whole line: teacher, captioner, 20,000 captions, pretraining, fine-tuning, scores."""
    return Line(
        images=_images(),
        questions=_questions(),
        collect=CollectStep(
            config=CollectConfig(
                sample=SampleConfig(
                    shares=(Share(source="easy-vqa", prompt=DETAILED_2026_11.name),)
                ),
                # Lossless: this teacher reads pixels.
                teacher=TeacherConfig(model="pixel-reader", image=ImageSent(format="png")),
            ),
            endpoint=Endpoint(
                base_url="http://127.0.0.1", api_key_env=None, limits=Limits(in_flight=128)
            ),
            local_teacher=True,
            images=TRAIN_IMAGES,
            out=TEACHER_CAPTIONS,
            batching=BATCHING,
        ),
        datasets=_datasets(),
        align=TrainStep(
            config=_stage(
                "align",
                template="plain",
                geometry="square",
                learning_rate=4e-4,
                epochs=4.0,
            ),
            start=Fresh(model=nano(), tokenizer_file=str(nano_tokenizer.file()), seed=SEED),
            dataset=ALIGN_DATA,
            out=ALIGNED,
        ),
        captioner=TrainStep(
            config=_stage("captioner", learning_rate=4e-4, epochs=10.0),
            start=ALIGNED,
            dataset=CAPTIONER_DATA,
            out=CAPTIONER,
        ),
        caption=caption_step(TRAIN_IMAGES, CAPTIONER, CAPTIONS),
        pretrain=_pretrain(PRETRAIN_DATA, PRETRAINED),
        finetune=_finetune(PRETRAINED, VLM),
        evaluate=_evaluate_step(VLM, ""),
    )


def easy_vqa_one_word() -> Line:
    """Baseline: the aligned model pretrained on one-word captions of the same images."""
    short = BuildConfig(parts=(CaptionsPart(captions=CAPTIONS, only_words=SHAPES),), seed=SEED)
    data = Ref(name="pretrain-data-one-word")
    pretrained, vlm = Ref(name="pretrained-one-word"), Ref(name="vlm-one-word")
    line = easy_vqa()
    return replace(
        line,
        datasets=(*line.datasets, DatasetStep(config=short, out=data)),
        pretrain=_pretrain(data, pretrained),
        finetune=_finetune(pretrained, vlm),
        evaluate=_evaluate_step(vlm, "-one-word"),
    )


def easy_vqa_no_pretraining() -> Line:
    """Baseline: from the aligned model straight to fine-tuning, in which everything trains."""
    vlm = Ref(name="vlm-no-pretraining")
    return replace(
        easy_vqa(),
        captioner=None,
        caption=None,
        pretrain=None,
        finetune=_finetune(ALIGNED, vlm, trainable=WHOLE),
        evaluate=_evaluate_step(vlm, "-no-pretraining"),
    )


def demo() -> Line:
    """Caption easy-VQA's 1,000 test images with the embedded nano captioner."""
    images, questions = _images()[1], _questions()[1]
    return Line(
        images=(images,),
        questions=(questions,),
        caption=caption_step(TEST_IMAGES, EMBEDDED, CAPTIONS),
    )
