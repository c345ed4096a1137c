# SPDX-License-Identifier: Apache-2.0
"""What the two sides of the training bench share: the model, the stage, the photographs, the
order of the samples; and the side of Ray Train.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from jobs import _bench_site as site
from jobs._cli import start_ray
from sg4v_ray.core.artifact import Manifest, Ref
from sg4v_ray.core.records import Turn
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.dataset import build
from sg4v_ray.dataset.conversations import JsonPart
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.model.processor import save_processor
from sg4v_ray.recipes import nano_tokenizer
from sg4v_ray.recipes.easy_vqa_teacher import describe, look
from sg4v_ray.recipes.sharegpt4v import pretrain
from sg4v_ray.sources import shapes
from sg4v_ray.training import launch
from sg4v_ray.training.config import Fresh, StageConfig
from sg4v_ray.training.job import make_plan
from sg4v_ray.training.lengths import TOKENIZER, Ruler
from sg4v_ray.training.samples import open_samples

MODEL: Final[ModelConfig] = site.model_150m()
SEED: Final = 0
"""Of the weights."""
DATASET: Final = Ref(name="bench-captions")
PROCESSOR: Final = "processor"
BATCHES: Final = "batches.json"
_SENTENCES: Final = 3, 8
"""A caption has at least so many of about 20 tokens each, and fewer than so many."""


def stage(steps: int) -> StageConfig:
    """Return the stage `pretrain`, cut down to the model and to one worker without a GPU.

    ZeRO-2 and float32, because CPUs are slow in bfloat16; no checkpoint before the last step. The
    rate is that of random weights: losses fall fast, so that equal losses mean equal steps.
    """
    return replace(
        pretrain(vision_from_block=MODEL.vision_layers // 2),
        learning_rate=1e-3,
        spike_factor=None,  # the bare script leaves no step out
        global_batch=2,
        micro_batch=2,
        max_steps=steps,
        max_length=512,
        dtype="float32",
        zero_stage=2,
        gradient_checkpointing=False,
        save_every_steps=steps + 1,
    )


def prepare(root: Path, steps: int) -> None:
    """Write photographs with captions as a dataset, and the batches of a run as a list."""
    of = stage(steps)
    images = root / "photos"
    files = site.make_photos(images, steps * of.global_batch)
    records = [_record(number, file.name) for number, file in enumerate(files)]
    (root / "llava.json").write_text(json.dumps(records))
    part = JsonPart(json=str(root / "llava.json"), images=str(images))
    build.run(
        build.BuildConfig(parts=(part,), seed=0),
        out=DATASET,
        where=Where(root=str(root), progress=False),
    )
    save_processor(
        root / PROCESSOR,
        config=MODEL,
        tokenizer_file=nano_tokenizer.file(),
        chat_template="",
        geometry=of.geometry,
    )
    (root / BATCHES).write_text(json.dumps(_batches(root, of)))


def caption(number: int) -> str:
    """Return a detailed caption of about 60 to 150 tokens, about drawn shapes."""
    low, high = _SENTENCES
    seeds = range(100 * number, 100 * number + low + number % (high - low))
    return " ".join(describe(look(shapes.draw(seed)), seed) for seed in seeds)


def _record(number: int, image: str) -> dict[str, Any]:
    turns = (("human", "<image>\nDescribe the image."), ("gpt", caption(number)))
    return {
        "id": f"{number:04d}",
        "image": image,
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }


def _batches(root: Path, of: StageConfig) -> list[list[dict[str, str]]]:
    """Return image and caption of each sample of each step, in the order of the plan."""
    samples = open_samples(Storage(str(root)), DATASET)
    with tempfile.TemporaryDirectory() as home:
        Storage(home).put(TOKENIZER, nano_tokenizer.file().read_bytes())
        ruler = Ruler(
            root=str(root),
            dataset=DATASET,
            home=home,
            template=of.template,
            num_image_tokens=MODEL.num_image_tokens,
            max_length=of.max_length,
        )
        lengths = ruler.measure(0, len(samples))
    plan = make_plan(of, lengths, image_row=MODEL.num_image_tokens + 1)
    return [
        [
            {"image": str(samples[index].uri), "caption": samples[index].turns[-1].text}
            for micro_batch in plan.micro_batches(step)
            for index in micro_batch
        ]
        for step in range(plan.total_steps)
    ]


def turns(text: str) -> tuple[Turn, ...]:
    """Return the conversation of a caption; the template `plain` leaves out the question."""
    return Turn(role="user", text=""), Turn(role="assistant", text=text)


def train(root: str, out: str, *, steps: int, threads: int) -> Manifest:
    """Train with Ray Train and our loop, as the jobs do."""
    start_ray(num_cpus=threads + 1, log_to_driver=False)
    return launch.run(
        stage(steps),
        start=Fresh(model=MODEL, tokenizer_file=str(nano_tokenizer.file()), seed=SEED),
        dataset=DATASET,
        out=Ref(name=out),
        where=Where(root=root, train_workers=1, worker_cpus=threads, progress=False),
    )
