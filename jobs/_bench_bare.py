# SPDX-License-Identifier: Apache-2.0
"""Bench: the training that a careful person would write for one run, with DeepSpeed and no Ray.

python -m jobs._bench_bare --root FOLDER --steps N --threads N

It takes from the library what decides the numbers: the model, what is frozen, tokens and pixels.
Loading (torch's DataLoader, a process that is two batches ahead), loss, schedule (transformers')
and loop are its own. There are no checkpoints, metrics or restarts, and a bad image ends it.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_schedule_with_warmup

from jobs._bench_training import BATCHES, MODEL, PROCESSOR, SEED, stage, turns
from sg4v_ray.model import weights
from sg4v_ray.model.conversation import IGNORE, Conversation
from sg4v_ray.model.freeze import freeze
from sg4v_ray.model.geometry import as_model_sees
from sg4v_ray.model.pixels import PixelMaker

_RAYS_NICENESS: Final = 15
"""Ray's default for its workers (`worker_niceness`): what else a machine does slows both alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to run."""

    root: str
    steps: int
    threads: int


class Batches(Dataset[dict[str, Tensor]]):
    """The batches of the run, each made when it is asked for."""

    def __init__(self, root: Path, steps: int) -> None:
        self._stage = stage(steps)
        self._batches = json.loads((root / BATCHES).read_text())
        self._conversation = Conversation.open(root / PROCESSOR, self._stage.template)
        self._normalise = PixelMaker.open(root / PROCESSOR)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Return ids, mask, labels and pixels of a step."""
        rows = [self._tokens(one["caption"]) for one in self._batches[step]]
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        ids = np.full(shape, self._conversation.pad_token_id)
        labels, mask = np.full(shape, IGNORE), np.zeros(shape, np.int64)
        for i, (row_ids, row_labels) in enumerate(rows):
            size = len(row_ids)
            ids[i, :size], labels[i, :size], mask[i, :size] = row_ids, row_labels, 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "pixel_values": self._normalise([self._pixels(one) for one in self._batches[step]]),
        }

    def _tokens(self, caption: str) -> tuple[Any, Any]:
        encoded = self._conversation.sample(turns(caption), num_images=1)
        ids = np.asarray(encoded.token_ids)
        repeats = np.where(ids == MODEL.image_token_id, MODEL.num_image_tokens, 1)
        return np.repeat(ids, repeats), np.repeat(np.asarray(encoded.labels), repeats)

    def _pixels(self, one: dict[str, str]) -> Any:
        with Image.open(one["image"]) as image:
            return as_model_sees(image.convert("RGB"), MODEL.image_size, self._stage.geometry)


def make_engine(steps: int) -> Any:
    """Return DeepSpeed's engine around the model."""
    of = stage(steps)
    model: Any = weights.create(MODEL, seed=SEED)
    freeze(model, of.trainable)
    # Training does not need this extension, and building it takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = "0"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = {
        "train_micro_batch_size_per_gpu": of.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_optimization": {
            "stage": of.zero_stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": of.learning_rate,
                "betas": of.betas,
                "eps": of.epsilon,
                "weight_decay": of.weight_decay,
                "torch_adam": True,
            },
        },
    }
    warmup = math.ceil(steps * of.warmup_ratio)
    engine, *_ = deepspeed.initialize(
        model=model.train(),
        model_parameters=[one for one in model.parameters() if one.requires_grad],
        lr_scheduler=lambda made: get_cosine_schedule_with_warmup(made, warmup, steps),
        config=config,
    )
    return engine


def step(engine: Any, batch: dict[str, Tensor]) -> float:
    """Make one optimizer step and return its loss."""
    labels_BT = batch.pop("labels")
    logits_BTV = engine(**batch, use_cache=False).logits
    loss = functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), ignore_index=IGNORE
    )
    del logits_BTV
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def run() -> None:
    """Train, and print seconds and loss of each step."""
    settings = tyro.cli(Settings, description=__doc__)
    os.nice(_RAYS_NICENESS)
    torch.set_num_threads(settings.threads)
    loader = iter(DataLoader(Batches(Path(settings.root), settings.steps), None, num_workers=1))
    engine = make_engine(settings.steps)
    losses, ends = [], [time.monotonic()]
    for batch in loader:
        losses.append(step(engine, batch))
        ends.append(time.monotonic())
    seconds = [round(end - start, 4) for start, end in pairwise(ends)]
    print(json.dumps({"part": "bare", "step_seconds": seconds, "losses": losses}), flush=True)


if __name__ == "__main__":
    run()
