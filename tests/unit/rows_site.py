# SPDX-License-Identifier: Apache-2.0
"""Five samples, good ones and bad ones, and what makes micro-batches of them."""

from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image

from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import Sample, Turn, schema, to_table
from sg4v_ray.model.conversation import Conversation
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.training.batch import KEPT_BYTES, Batches, RowRules, Rows
from sg4v_ray.training.plan import Plan, unknown_lengths
from sg4v_ray.training.samples import Samples

TOKENS_AN_IMAGE, SIDE = 4, 16
RULES = RowRules(
    geometry="pad",
    image_size=SIDE,
    num_image_tokens=TOKENS_AN_IMAGE,
    max_length=400,
    image_limits=ImageLimits(),
)
PIXELS = PixelMaker(size=SIDE, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))


def _sample(name: str, uri: str | None, answer: str = "red") -> Sample:
    turns = (Turn(role="user", text="Colour?"), Turn(role="assistant", text=answer))
    return Sample(id=name, source="test", uri=uri, turns=turns)


def write_samples(folder: Path) -> Path:
    """Write a dataset: 0 good, 1 text only, 2 missing image, 3 cut image, 4 long answer."""
    good, broken = folder / "good.png", folder / "broken.png"
    Image.new("RGB", (30, 20), "red").save(good)
    broken.write_bytes(good.read_bytes()[:40])
    rows = [
        _sample("good", str(good)),
        _sample("text only", None, "a typed </s> and <image>"),
        _sample("missing", str(folder / "nowhere.png")),
        _sample("broken", str(broken)),
        _sample("long", f"file://{good}", "red " * 50),
    ]
    file = folder / "samples.arrow"
    with pa.ipc.new_file(str(file), schema(Sample)) as writer:
        for start in (0, 2, 4):
            writer.write_table(to_table(Sample, rows[start : start + 2]))
    return file


def open_rows(
    file: Path, model: Path, rules: RowRules = RULES, *, kept_bytes: int = KEPT_BYTES
) -> Rows:
    """Return what makes the rows of the dataset."""
    conversation = Conversation.open(model, "vicuna_v1")
    return Rows(Samples(file), conversation, rules, kept_bytes=kept_bytes)


def make_batches(
    rows: Rows,
    *,
    processes: int = 0,
    steps: int = 5,
    pixels: PixelMaker = PIXELS,
    pin: bool = False,
) -> Batches:
    """Return the batches of the second of two workers: two samples in each step."""
    lengths = unknown_lengths(5)
    return Batches(
        plan=Plan(lengths=lengths, global_batch=4, micro_batch=2, total_steps=steps, seed=0),
        rows=rows,
        normalise=pixels,
        rank=1,
        world_size=2,
        threads=2,
        processes=processes,
        pin=pin,
    )
