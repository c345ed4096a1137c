# SPDX-License-Identifier: Apache-2.0
"""The paper as a line of jobs at its own size: teacher, Share-Captioner, 1.2M captions, training.

What it starts from is imported first: `python -m jobs.import_weights --kind vicuna-clip ...
--out.name vicuna-clip`. Paths of the data are flags. The instruction mix takes the published
captions; yours are taken with `--mix.config.captions`, from `jobs.export_captions`. Nothing of it
was run on GPUs yet.
"""

from typing import Final

from sg4v_ray.captions.bulk import BulkConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.dataset.build import BuildConfig, CaptionsPart
from sg4v_ray.dataset.conversations import JsonPart, MixPart
from sg4v_ray.exactly_once.config import GenerateConfig
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.instructions import UNIFIED
from sg4v_ray.recipes import mixes, sharegpt4v, sources
from sg4v_ray.recipes.line import CaptionStep, DatasetStep, Line, TrainStep
from sg4v_ray.training.config import StageConfig

BASE: Final = Ref(name="vicuna-clip")
"""A language model and a tower that were pretrained, and a projector that was not."""
IMAGES, CAPTIONS = Ref(name="images"), Ref(name="captions")
ALIGN_DATA, CAPTIONER_DATA = Ref(name="align-data"), Ref(name="captioner-data")
PRETRAIN_DATA, FINETUNE_DATA = Ref(name="pretrain-data"), Ref(name="finetune-data")
ALIGNED, CAPTIONER = Ref(name="aligned"), Ref(name="captioner")
PRETRAINED, VLM = Ref(name="pretrained"), Ref(name="vlm")


def sharegpt4v_line() -> Line:
    """The paper, 7B or 13B by what is imported as vicuna-clip: teacher to fine-tuning. For GPUs."""
    return Line(
        images=sources.paper_images().images,
        collect=sources.paper_images().collect,
        mix=mixes.published().mix,
        datasets=_datasets(),
        align=_train(sharegpt4v.align(), BASE, ALIGN_DATA, ALIGNED),
        captioner=_train(sharegpt4v.captioner(), ALIGNED, CAPTIONER_DATA, CAPTIONER),
        caption=_caption(),
        pretrain=_train(sharegpt4v.pretrain(), ALIGNED, PRETRAIN_DATA, PRETRAINED),
        finetune=_train(sharegpt4v.finetune(), PRETRAINED, FINETUNE_DATA, VLM),
    )


def _train(config: StageConfig, start: Ref, dataset: Ref, out: Ref) -> TrainStep:
    return TrainStep(config=config, start=start, dataset=dataset, out=out)


def _datasets() -> tuple[DatasetStep, ...]:
    collected = sources.paper_images().collect
    assert collected is not None
    parts = (
        (
            ALIGN_DATA,
            JsonPart(
                json="/data/blip_laion_cc_sbu_558k.json", images="/data/LLaVA-Pretrain/images"
            ),
        ),
        (CAPTIONER_DATA, CaptionsPart(captions=collected.out)),
        (PRETRAIN_DATA, CaptionsPart(captions=CAPTIONS)),
        (FINETUNE_DATA, MixPart(mix=mixes.MIX, images="/data")),
    )
    return tuple(
        DatasetStep(config=BuildConfig(parts=(part,), seed=mixes.SEED), out=out)
        for out, part in parts
    )


def _caption() -> CaptionStep:
    """Caption with what was just trained, as one serves: greedily on vLLM.

    Ours: the published script samples three beams on transformers, up to 500 tokens.
    """
    return CaptionStep(
        config=BulkConfig(
            generate=GenerateConfig(
                template="vicuna_v1",
                generation=Generation(max_tokens=500),
                instruction=UNIFIED,
                cut_off="reject",
            ),
            geometry="pad",
        ),
        engine=EngineConfig(kind="vllm", capacity=128),
        images=IMAGES,
        captioner=CAPTIONER,
        out=CAPTIONS,
    )
