# SPDX-License-Identifier: Apache-2.0
"""On a GPU, in the type that production uses, the captioner still says what is in the image."""

import asyncio
from typing import Any

import easy_vqa
import pytest
from PIL import Image

from sg4v_ray.analysis.easy_vqa import agreement, official
from sg4v_ray.core.records import Turn
from sg4v_ray.inference.engine import Completion, Generation, Request, complete
from sg4v_ray.inference.open import EngineConfig, open_engine
from sg4v_ray.model.conversation import Conversation
from sg4v_ray.model.geometry import as_model_sees
from sg4v_ray.model.instructions import UNIFIED
from sg4v_ray.recipes import embedded
from sg4v_ray.sources.easy_vqa import EasyVqaQuestions

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_bf16_captions_name_the_right_shape_and_colour(kind: Any) -> None:
    paths = easy_vqa.get_test_image_paths()
    folder = embedded.folder() / "model"
    conversation = Conversation.open(folder, "vicuna_v1")
    prompt = conversation.prompt([Turn(role="user", text=UNIFIED)], num_images=1)
    requests = [
        Request(
            token_ids=prompt.token_ids,
            images=(as_model_sees(Image.open(paths[number]).convert("RGB"), 64, "pad"),),
            generation=Generation(max_tokens=64),
        )
        for number in sorted(paths)
    ]

    async def ask() -> list[Completion]:
        config = EngineConfig(kind=kind, dtype="bfloat16", capacity=64, max_model_len=512)
        engine = open_engine(config, folder, threads=2)
        await engine.start()
        try:
            return await asyncio.gather(*(complete(engine, one) for one in requests))
        finally:
            await engine.close()

    texts = [conversation.decode(one.token_ids) for one in asyncio.run(ask())]
    uris = {f"test-{number:05d}": path for number, path in paths.items()}
    known = official(EasyVqaQuestions(split="test").rows(uris))
    found = agreement(dict(zip(sorted(uris), texts, strict=True)), known)
    assert found.right_shape >= 0.95
    assert found.right_colour >= 0.95
