# SPDX-License-Identifier: Apache-2.0
"""The measurements of the captioning bench; each runs in a process of its own."""

import asyncio
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import ray

from jobs import _bench_site as site
from jobs._bench_memory import Watcher, growth
from jobs._cli import start_ray
from sg4v_ray.captions import bulk
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.images import ImageLimits, Rejected, open_image
from sg4v_ray.core.records import Turn
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once import stage as stages
from sg4v_ray.exactly_once.config import Batching, GenerateConfig
from sg4v_ray.exactly_once.monitor import curves
from sg4v_ray.exactly_once.stage import Stage
from sg4v_ray.inference.engine import PUBLISHED_DECODING, Generation, Request, complete
from sg4v_ray.inference.open import EngineConfig, open_engine
from sg4v_ray.inference.prompt import PromptRules
from sg4v_ray.model.conversation import Conversation
from sg4v_ray.model.geometry import as_model_sees
from sg4v_ray.model.instructions import UNIFIED
from sg4v_ray.recipes import embedded
from sg4v_ray.sources.easy_vqa import EasyVqaImages

ASK = GenerateConfig(
    template="vicuna_v1",
    generation=Generation(max_tokens=200),
    instruction=UNIFIED,
    cut_off="keep",
)
VLLM = EngineConfig(kind="vllm", dtype="float32", capacity=48, max_model_len=512, compile=False)
_SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")
NO_GATE = QualityConfig(min_words=1, max_phrase_repeats=10**6, max_word_run=10**6)
"""Random weights and fakes write no captions, so their text is not judged."""
ROWS_PER_PART = 2048
"""Of the control-plane case: about a second of its work."""
_WARM_UP_S: Final = 120.0
"""Ray Data's stats actor grows by 14 MB in its first three minutes, with each report of a dataset,
and by less than 2 MB in the next seven (Ray 2.60.0)."""


class Settings(Protocol):
    """What the parts read of the bench's flags."""

    root: str
    threads: int
    images: int
    published_images: int
    rows: int
    actors: int
    out: str


def machine(threads: int) -> dict[str, Any]:
    """Return where this runs, with the thread binding that all engines get."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "binding": "none (the system places the threads), OMP_NUM_THREADS and torch set to threads",
        "python": platform.python_version(),
    }


def say(**measured: Any) -> None:
    """Print one measurement as a JSON line."""
    print(json.dumps(measured), flush=True)


def prepare_engine_case(root: str, images: int) -> None:
    """Write the model and the index of the engine case."""
    storage = Storage(root)
    site.make_model(storage)
    files = sorted(Path(root, "photos").glob("*.jpg"))
    site.make_index(storage, site.rows_over(files, images))


def _stage(root: str, engine: EngineConfig, captioner: Ref, out: str, where: Where) -> Stage:
    return bulk.stage_of(
        bulk.BulkConfig(
            generate=ASK,
            geometry="pad",
            quality=NO_GATE,
            budget=RejectBudget(max_reject_rate=1.0),
        ),
        engine=engine,
        images=site.IMAGES,
        captioner=captioner,
        out=Ref(name=out),
        where=where,
    )


def _prompt(model: Path) -> tuple[int, ...]:
    """Return what every engine is asked, with one placeholder for the image."""
    turns = [Turn(role="user", text=UNIFIED)]
    return Conversation.open(model, "vicuna_v1").prompt(turns, num_images=1).token_ids


def _requests(bench: Settings, images: int) -> list[Request]:
    folder = Path(bench.root, site.CAPTIONER.path, "model")
    ids = _prompt(folder)
    requests = []
    for number, file in enumerate(sorted(Path(bench.root, "photos").glob("*.jpg"))[:images]):
        image = open_image(file.read_bytes(), ImageLimits())
        if isinstance(image, Rejected):
            raise Sg4vError(f"{file}: {image.detail}; delete {bench.root} and run again")
        pixels = as_model_sees(image, site.model_150m().image_size, "pad")
        how = Generation(max_tokens=site.num_tokens(f"{number:07d}"))
        requests.append(Request(token_ids=ids, images=(pixels,), generation=how))
    return requests


def bare(bench: Settings) -> None:
    """Measure the engine alone: pixels in memory, all requests at once."""
    folder = Path(bench.root, site.CAPTIONER.path, "model")
    requests = _requests(bench, bench.images)

    async def run() -> tuple[float, int]:
        engine = open_engine(VLLM, folder, threads=bench.threads)
        await engine.start()
        started_s = time.monotonic()
        done = await asyncio.gather(*(complete(engine, one) for one in requests))
        seconds = time.monotonic() - started_s
        await engine.close()
        return seconds, sum(len(one.token_ids) for one in done)

    seconds, tokens = asyncio.run(run())
    say(part="bare", images_per_s=round(len(requests) / seconds, 3), tokens=tokens)


def job(bench: Settings) -> None:
    """Measure the captioning job, from the engine ready to the last row."""
    where = Where(root=bench.root, engine_threads=bench.threads, progress=False)
    out = f"job-{time.time_ns()}"
    stage = _stage(bench.root, VLLM, site.CAPTIONER, out, where)
    made = stage.step
    stage = replace(
        stage, step=lambda attempt: replace(made(attempt), actor=site.GenerateSetLengths)
    )
    batching = Batching(rows_per_part=64, rows_per_task=16)
    start_ray(num_cpus=4, log_to_driver=False)
    manifest = stages.write_rows(stage, batching=batching, where=where)
    ray.shutdown()
    say(
        part="job",
        images_per_s=manifest.metrics["rows_per_s"],
        tokens=manifest.counts["tokens"],
    )


def published(bench: Settings) -> None:
    """Measure the published captioner's settings: batches of 4, 3 beams, decoding in the loop.
    A batch is as long as its longest caption, as there.
    """
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    from sg4v_ray.model.weights import load

    torch.set_num_threads(bench.threads)
    folder = Path(bench.root, site.CAPTIONER.path, "model")
    model, processor = load(folder, dtype=VLLM.dtype), AutoImageProcessor.from_pretrained(folder)
    every = sorted(Path(bench.root, "photos").glob("*.jpg"))[: bench.images]
    # Spread over all, so that the answers are about as long as in the other cases.
    numbers = [n * len(every) // bench.published_images for n in range(bench.published_images)]
    rules = PromptRules.read(folder, max_model_len=VLLM.max_model_len)
    prompt = rules.expand(_prompt(folder))
    started_s = time.monotonic()
    for start in range(0, len(numbers), 4):
        batch = numbers[start : start + 4]
        images = [Image.open(every[number]).convert("RGB") for number in batch]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        inputs = {
            "input_ids": torch.tensor([prompt] * len(batch)),
            "attention_mask": torch.ones(len(batch), len(prompt), dtype=torch.long),
            "pixel_values": pixels.to(model.dtype),
        }
        longest = max(site.num_tokens(f"{number:07d}") for number in batch)
        with torch.inference_mode():
            model.generate(
                **inputs,
                max_new_tokens=longest,
                min_new_tokens=longest,
                num_beams=PUBLISHED_DECODING.num_beams,
                do_sample=True,
                temperature=PUBLISHED_DECODING.temperature,
                repetition_penalty=PUBLISHED_DECODING.repetition_penalty,
            )
    seconds = time.monotonic() - started_s
    say(part="published", images_per_s=round(len(numbers) / seconds, 4))


def prepare_rows(root: str, count: int) -> None:
    """Write the index of the control-plane case: easy-VQA's 5,000 images again and again."""
    storage = Storage(root)
    embedded.install_captioner(storage)
    pictures = [
        Path(row.uri)
        for split in _SPLITS
        for row in EasyVqaImages(split=split, name=split).rows(storage.sub(f"easy-vqa/{split}"))
    ]
    site.make_index(storage, site.rows_over(pictures, count))


def rows(bench: Settings) -> None:
    """Measure everything but a model, from the index to the committed Parquet files."""
    where = Where(root=bench.root, max_actors=1, progress=False)
    engine = EngineConfig(kind="fake", capacity=512, max_model_len=512, tokens_per_step=64)
    stage = _stage(bench.root, engine, embedded.CAPTIONER, bench.out, where)
    batching = Batching(rows_per_part=ROWS_PER_PART, rows_per_task=128)
    start_ray(num_cpus=4, log_to_driver=False)
    started_s = time.monotonic()
    with Watcher() as memory:
        manifest = stages.write_rows(stage, batching=batching, where=where)
        seconds = time.monotonic() - started_s
    curve = curves(Storage(f"{bench.root}/{stage.out.path}"))[-1]
    grown = growth(memory.samples, after_s=settled_s(curve, bench.rows))
    ray.shutdown()
    say(
        part="rows",
        rows_per_s=round(manifest.counts["rows"] / seconds, 1),
        memory_mb={name: [round(one, 1) for one in pair] for name, pair in grown.items()},
    )


def settled_s(curve: list[dict[str, Any]], rows: int) -> float:
    """Return the second from which growth counts: a sixth of the rows and the warm-up are over, in
    a short run half of the rows.
    """
    return next(
        (
            point["seconds"]
            for point in curve
            if point["rows"] >= rows / 2
            or (point["rows"] >= rows / 6 and point["seconds"] >= _WARM_UP_S)
        ),
        0.0,
    )


def actors(bench: Settings) -> None:
    """Measure the rate of many actors in steady state, each at 5 images a second."""
    where = Where(
        root=bench.root,
        min_actors=bench.actors,
        max_actors=bench.actors,
        engine_cpus=1.0,
        progress=False,
    )
    # 32 rows in its batch, 8 tokens each, all of them in a step of 6.4 s: 5 images a second.
    engine = EngineConfig(
        kind="fake", capacity=32, max_model_len=512, latency_s=6.4, tokens_per_step=8
    )
    out = f"actors-{bench.actors}"
    stage = _stage(bench.root, engine, embedded.CAPTIONER, out, where)
    made = stage.step
    stage = replace(stage, step=lambda one: replace(made(one), actor=site.GenerateEqualLengths))
    start_ray(num_cpus=bench.actors + 3, log_to_driver=False)
    batching = Batching(rows_per_part=128)
    stages.write_rows(stage, batching=batching, where=where)
    curve = curves(Storage(f"{bench.root}/{stage.out.path}"))[-1]
    ray.shutdown()
    full = [point for point in curve if point["actors"] == bench.actors]
    # The second half without its end: until then actors still fill up, one after another.
    steady = full[len(full) // 2 : -max(1, len(full) // 8)]
    first, last = steady[0], steady[-1]
    # Between the ends of two slices: rows are counted in slices.
    rate = (last["rows"] - first["rows"]) / (last["last_row_s"] - first["last_row_s"])
    say(part="actors", actors=bench.actors, images_per_s=round(rate, 3))
