# SPDX-License-Identifier: Apache-2.0
"""The captioner that comes with this package is one model wherever it runs.

Equal token ids and pixels in training, bulk captioning and serving; equal words from both engines.
"""

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from serve.config import Limits
from serve.deployment import ModelDeployment
from serve.protocol import parse
from serve.request import ChatModel, to_request
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import Sample, Turn, schema, to_table
from sg4v_ray.exactly_once.pixels import ModelPixels, add_images
from sg4v_ray.inference.engine import Completion, Engine, Generation, Pixels, Request, complete
from sg4v_ray.inference.open import EngineConfig, open_engine
from sg4v_ray.model.conversation import Conversation
from sg4v_ray.model.geometry import Geometry, as_model_sees
from sg4v_ray.model.instructions import UNIFIED
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.recipes import embedded
from sg4v_ray.training.batch import RowRules, Rows
from sg4v_ray.training.samples import Samples

SIZE, TOKENS_AN_IMAGE = 64, 64
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded.folder() / "model"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos of other shapes than the model's, a JPEG turned by EXIF among them."""
    home = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    made = []
    for number, side in enumerate([(300, 180), (64, 64), (90, 400)]):
        image = Image.fromarray(noise).resize(side, Image.Resampling.BICUBIC)
        image.save(home / f"{number}.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(home / f"{number}.jpg", exif=exif)
        made += [home / f"{number}.png", home / f"{number}.jpg"]
    return made


def in_training(folder: Path, files: list[Path], geometry: Geometry, scratch: Path) -> Rows:
    turns = (Turn(role="user", text=UNIFIED), Turn(role="assistant", text="a red circle"))
    samples = [Sample(id=one.name, source="x", uri=str(one), turns=turns) for one in files]
    with pa.ipc.new_file(str(scratch / "samples.arrow"), schema(Sample)) as writer:
        writer.write_table(to_table(Sample, samples))
    rules = RowRules(
        geometry=geometry,
        image_size=SIZE,
        num_image_tokens=TOKENS_AN_IMAGE,
        max_length=512,
        image_limits=ImageLimits(),
    )
    conversation = Conversation.open(folder, "vicuna_v1")
    return Rows(Samples(scratch / "samples.arrow"), conversation, rules)


def in_serving(folder: Path, file: Path, geometry: Geometry) -> Request:
    config = ModelDeployment(
        id="captioner",
        artifact=embedded.CAPTIONER,
        root="/nowhere",
        template="vicuna_v1",
        geometry=geometry,
        engine=EngineConfig(kind="hf", dtype="float32", max_model_len=512),
        generation=Generation(max_tokens=64),
    )
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": UNIFIED},
    ]
    body = {"model": "captioner", "messages": [{"role": "user", "content": content}]}
    model = ChatModel.open(config, folder)
    return to_request(parse(json.dumps(body).encode()), model=model, limits=Limits()).request


@pytest.mark.parametrize("geometry", ["pad", "square"])
def test_training_captioning_and_serving_see_equal_pixels_and_token_ids(
    folder: Path, files: list[Path], geometry: Geometry, tmp_path: Path
) -> None:
    rows = in_training(folder, files, geometry, tmp_path)
    table = pa.table({"uri": [str(one) for one in files]})
    encode = ModelPixels(size=SIZE, geometry=geometry)
    in_bulk = add_images(table, limits=ImageLimits(), encode=encode, fetch=FetchConfig())[
        "image"
    ].to_pylist()
    prompt = Conversation.open(folder, "vicuna_v1").prompt(
        [Turn(role="user", text=UNIFIED)], num_images=1
    )
    for number, file in enumerate(files):
        trained, served = rows(number), in_serving(folder, file, geometry)
        assert trained.pixels is not None
        assert np.array_equal(trained.pixels, served.images[0])
        assert trained.pixels.tobytes() == in_bulk[number]
        assert served.token_ids == prompt.token_ids
        image = served.token_ids.index(rows.filler.token_ids[1])
        expanded = [
            *served.token_ids[:image],
            *[served.token_ids[image]] * TOKENS_AN_IMAGE,
            *served.token_ids[image + 1 :],
        ]
        assert trained.token_ids[: len(expanded)].tolist() == expanded


@pytest.fixture(scope="module")
def squares() -> list[Pixels]:
    """The first 32 test images of easy-VQA."""
    paths = easy_vqa.get_test_image_paths()
    images = [Image.open(paths[number]).convert("RGB") for number in sorted(paths)[:32]]
    return [as_model_sees(one, SIZE, "pad") for one in images]


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_both_engines_write_equal_captions_from_equal_pixels(
    folder: Path, squares: list[Pixels], run: Run
) -> None:
    conversation = Conversation.open(folder, "vicuna_v1")
    prompt = conversation.prompt([Turn(role="user", text=UNIFIED)], num_images=1)
    how = Generation(max_tokens=64)
    requests = [
        Request(token_ids=prompt.token_ids, images=(one,), generation=how) for one in squares
    ]

    async def ask(engine: Engine) -> list[Completion]:
        return await asyncio.gather(*(complete(engine, one) for one in requests))

    said = {}
    for kind in ("hf", "vllm"):
        config = EngineConfig(
            kind=kind,
            dtype="float32",
            capacity=8,
            max_model_len=512,
            compile=False,
            kv_cache_gb=0.25,
        )
        engine = open_engine(config, folder, threads=2)
        run(engine.start())
        try:
            said[kind] = run(ask(engine))
            if kind == "vllm":
                inside = run(rendered(engine, squares))
        finally:
            run(engine.close())
    assert said["vllm"] == said["hf"]
    assert len({one.token_ids for one in said["hf"]}) > 16  # else equality would say little
    assert torch.equal(inside, PixelMaker.open(folder)(squares))


async def rendered(engine: Any, squares: list[Pixels]) -> torch.Tensor:
    """Return the pixel values that vLLM's own processor makes, (N, 3, S, S)."""
    prompts = [
        {"prompt_token_ids": [1, 4, 60], "multi_modal_data": {"image": Image.fromarray(one)}}
        for one in squares
    ]
    work = engine._submit(engine._llm.renderer.render_cmpl_async(prompts))
    made = await asyncio.wrap_future(work)
    return torch.stack([one["mm_kwargs"]["image"][0]["pixel_values"].data for one in made])
