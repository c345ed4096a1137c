# SPDX-License-Identifier: Apache-2.0
"""What the captioning benches work on: images, a model of random weights, an index."""

import math
import random
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from sg4v_ray.core.artifact import Ref, begin, commit
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import ImageRow, to_table
from sg4v_ray.core.row_files import ROWS_PER_INDEX_FILE, put_table
from sg4v_ray.core.rows import ROWS
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.generate import Generate
from sg4v_ray.inference.engine import Generation
from sg4v_ray.model.config import ModelConfig

CAPTIONER = Ref(name="bench-captioner")
IMAGES = Ref(name="bench-images")
_SHORTEST, _LONGEST = 16, 200


def model_150m() -> ModelConfig:
    """Return a ViT of 12 x 384 at 224/16 and a Llama of 30 x 576: 185M parameters.

    150M when the head is the embedding, as in the language model that it is shaped after.
    """
    return ModelConfig(
        name="bench-150m",
        image_size=224,
        patch_size=16,
        vision_width=384,
        vision_mlp=1536,
        vision_layers=12,
        vision_heads=6,
        text_width=576,
        text_mlp=1536,
        text_layers=30,
        text_heads=9,
        text_kv_heads=3,
        vocab_size=49_152,
        max_positions=2048,
        image_token_id=4,
        pad_token_id=3,
    )


def num_tokens(key: str) -> int:
    """Return how long the caption of an image is, the same in every case: log-normal, its limits
    16 and 200 two deviations from the median of 57.
    """
    drawn = random.Random(zlib.crc32(key.encode())).lognormvariate(4.04, 0.63)
    return min(_LONGEST, max(_SHORTEST, round(drawn)))


class GenerateSetLengths(Generate):
    """The captioning actor, except that each row's answer has the length of `num_tokens`."""

    def _generation(self, key: str) -> Generation:
        return Generation(max_tokens=num_tokens(key))


class GenerateEqualLengths(Generate):
    """The captioning actor, except that each answer has 8 tokens."""

    def _generation(self, key: str) -> Generation:
        return Generation(max_tokens=8)


def make_photos(folder: Path, count: int) -> list[Path]:
    """Write JPEGs of 300 to 1,500 pixels a side, as large as photographs of that size are."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        rng = np.random.default_rng(number)
        width, height = (int(one) for one in rng.integers(300, 1501, 2))
        coarse = rng.integers(0, 256, (math.ceil(height / 16), math.ceil(width / 16), 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = Image.effect_noise((width, height), 24).convert("RGB")
        image = Image.blend(image, grain, 0.15).filter(ImageFilter.GaussianBlur(0.6))
        files.append(folder / f"{number:04d}.jpg")
        image.save(files[-1], quality=90)
    return files


def make_model(storage: Storage) -> None:
    """Write the 150M model with random weights as the captioner artifact."""
    from sg4v_ray.model.conversation import chat_template
    from sg4v_ray.model.processor import save_processor
    from sg4v_ray.model.weights import create, save
    from sg4v_ray.recipes import nano_tokenizer

    config = model_150m()
    home = begin(storage, CAPTIONER, {"model": config})
    folder = Path(storage.root) / CAPTIONER.path / "model"
    save(create(config, seed=0), folder, dtype="bfloat16")
    save_processor(
        folder,
        config=config,
        tokenizer_file=nano_tokenizer.file(),
        chat_template=chat_template("vicuna_v1"),
        geometry="pad",
    )
    with hold(home) as lease:
        commit(storage, CAPTIONER, config={"model": config}, inputs={}, counts={}, lease=lease)


def make_index(storage: Storage, rows: Iterator[ImageRow], *, out: Ref = IMAGES) -> None:
    """Write rows as an index, instead of the index that an earlier case made there."""
    storage.delete(out.path)
    artifact_dir = begin(storage, out, {})
    tables = (to_table(ImageRow, batch) for batch in batched(rows, ROWS_PER_INDEX_FILE))
    files = tuple(
        put_table(artifact_dir, f"{ROWS}/part-{number:05d}.parquet", table)
        for number, table in enumerate(tables)
    )
    with hold(artifact_dir) as lease:
        counts = {"rows": sum(one.rows for one in files)}
        commit(
            storage, out, config={}, inputs={}, counts=counts, attempts=(ROWS,), files=files,
            lease=lease,
        )  # fmt: skip


def batched(rows: Iterator[ImageRow], size: int) -> Iterator[list[ImageRow]]:
    """Yield lists of `size` rows; the last has fewer."""
    while batch := list(islice(rows, size)):
        yield batch


def rows_over(files: list[Path], count: int) -> Iterator[ImageRow]:
    """Yield `count` rows that go round some files."""
    sizes = [file.stat().st_size for file in files]
    for number in range(count):
        place = number % len(files)
        yield ImageRow(
            id=f"{number:07d}",
            source="bench",
            uri=str(files[place]),
            size_bytes=sizes[place],
        )
