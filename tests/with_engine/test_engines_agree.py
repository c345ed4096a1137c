# SPDX-License-Identifier: Apache-2.0
"""vLLM says what transformers says, from the same folder; beams are transformers' own."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from sg4v_ray.inference.engine import (
    PUBLISHED_DECODING,
    Completion,
    Engine,
    Pixels,
    Request,
    complete,
)
from sg4v_ray.model import weights
from sg4v_ray.model.config import EOS_TOKEN_ID, ModelConfig
from sg4v_ray.model.pixels import PixelMaker

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Ask = Callable[..., Request]
Pictures = list[Pixels]

hf_only = pytest.mark.parametrize("engine", ["hf"], indirect=True)


async def _complete_all(engine: Engine, requests: list[Request]) -> list[Completion]:
    return await asyncio.gather(*(complete(engine, one) for one in requests))


@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_equal(
    engines: dict[str, Engine], pictures: Pictures, ask: Ask, run: Run, penalty: float
) -> None:
    requests = [
        ask(one, words=3 + index % 5, max_tokens=48, repetition_penalty=penalty)
        for index, one in enumerate(pictures)
    ]
    requests.append(ask(*pictures[:3], max_tokens=48, repetition_penalty=penalty))
    answers = {}
    for kind in ("hf", "vllm"):
        run(engines[kind].start())
        answers[kind] = run(_complete_all(engines[kind], requests))
    assert answers["vllm"] == answers["hf"]
    # Else equality would say little.
    assert len({one.token_ids for one in answers["hf"]}) > len(pictures) // 2


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllms_processor_makes_the_pixels_that_training_sees(
    engines: dict[str, Engine], model_folder: Path, pictures: Pictures, run: Run
) -> None:
    run(engines["vllm"].start())
    inside = run(_rendered_pixels(engines["vllm"], pictures[:2]))
    assert torch.equal(inside, PixelMaker.open(model_folder)(pictures[:2]))


async def _rendered_pixels(engine: Any, pictures: Pictures) -> torch.Tensor:
    prompt = {
        "prompt_token_ids": [1, 4, 4, 60],
        "multi_modal_data": {"image": [Image.fromarray(one) for one in pictures]},
    }
    work = engine._submit(engine._llm.renderer.render_cmpl_async([prompt]))
    (rendered,) = await asyncio.wrap_future(work)
    images = rendered["mm_kwargs"]["image"]
    return torch.stack([one["pixel_values"].data for one in images])


def test_the_saved_processor_makes_the_pixels_that_training_sees(
    model_folder: Path, pictures: Pictures
) -> None:
    processor = AutoProcessor.from_pretrained(model_folder)
    images = [Image.fromarray(one) for one in pictures]
    theirs = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(PixelMaker.open(model_folder)(pictures), theirs)


@hf_only
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_beams_are_those_of_transformers(
    engine: Engine,
    model: ModelConfig,
    model_folder: Path,
    pictures: Pictures,
    ask: Ask,
    run: Run,
    num_images: int,
) -> None:
    request = ask(*pictures[:num_images], max_tokens=16, num_beams=3)
    reference = weights.load(model_folder, dtype="float32")
    ids = [
        token
        for one in request.token_ids
        for token in [one] * (model.num_image_tokens if one == model.image_token_id else 1)
    ]
    inputs = {"input_ids": torch.tensor([ids])}
    if num_images:
        inputs["pixel_values"] = PixelMaker.open(model_folder)(request.images)
    whole = reference.generate(**inputs, max_new_tokens=16, num_beams=3)
    expected = whole[0, len(ids) :].tolist()
    assert list(run(complete(engine, request)).token_ids) == expected


@hf_only
def test_the_published_decoding_depends_on_its_seed_and_not_on_its_batch_mates(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    def published(picture: int, seed: int) -> Request:
        how = replace(PUBLISHED_DECODING, max_tokens=12, seed=seed)
        return replace(ask(pictures[picture]), generation=how)

    requests = [published(n, n) for n in range(3)]
    alone = [run(complete(engine, one)) for one in requests]
    assert run(_complete_all(engine, requests)) == alone
    assert run(complete(engine, published(0, 99))) != alone[0]


@hf_only
def test_a_beam_answer_does_not_depend_on_its_batch_mates_and_comes_as_one_delta(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    shapes = [(1, 4), (2, 1), (0, 20), (1, 9), (1, 2)]
    requests = [
        ask(*pictures[index : index + images], words=words, max_tokens=16, num_beams=2, seed=index)
        for index, (images, words) in enumerate(shapes)
    ]
    requests.append(ask(pictures[9], max_tokens=16))  # of another kind
    alone = [run(complete(engine, one)) for one in requests]
    assert run(_complete_all(engine, requests)) == alone

    async def deltas() -> int:
        return len([delta async for delta in engine.generate(requests[0])])

    assert run(deltas()) == 1


@hf_only
def test_beams_that_sample_are_equal_for_equal_seeds(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    request = ask(pictures[0], max_tokens=16, num_beams=3, temperature=2.0, seed=1)
    other = replace(request, generation=replace(request.generation, seed=2))
    one, again, another = (run(complete(engine, each)) for each in (request, request, other))
    assert one == again != another


@hf_only
def test_a_beam_answer_ends_at_its_end_token_or_at_max_tokens(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    requests = [
        ask(one, max_tokens=24, num_beams=3, temperature=2.0, seed=index)
        for index, one in enumerate(pictures[:6])
    ]
    for answer in run(_complete_all(engine, requests)):
        stopped = answer.finish_reason == "stop"
        assert answer.token_ids.count(EOS_TOKEN_ID) == stopped
        assert (answer.token_ids[-1] == EOS_TOKEN_ID) if stopped else len(answer.token_ids) == 24


@hf_only
def test_beams_that_nobody_waits_for_end_early(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    async def abort() -> int:
        request = ask(pictures[0], max_tokens=300, num_beams=2)
        task = asyncio.ensure_future(complete(engine, request))
        before = engine.stats().decode_steps
        while engine.stats().decode_steps < before + 2:
            await asyncio.sleep(0.001)
        task.cancel()
        while engine.stats().running:
            await asyncio.sleep(0.001)
        return engine.stats().decode_steps - before

    assert run(abort()) < 100
