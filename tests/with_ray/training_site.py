# SPDX-License-Identifier: Apache-2.0
"""A tiny model, 60 synthetic samples and a root to train in, for the tests of training.

Sample 7 has a broken image; every tenth sample has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import safetensors.torch
from PIL import Image
from torch import Tensor

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit
from sg4v_ray.core.config import to_plain
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import Sample, Turn, schema, to_table
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import MODEL_FOLDER, ModelSource
from sg4v_ray.model.config import ModelConfig, nano
from sg4v_ray.model.freeze import FreezePlan
from sg4v_ray.training import launch
from sg4v_ray.training.config import Fresh, StageConfig

DATASET = Ref(name="shapes")
COLOURS = ("red", "green", "blue", "white", "black")
TINY = replace(
    nano(400),
    name="tiny",
    image_size=16,
    vision_width=32,
    vision_mlp=64,
    vision_layers=3,
    vision_heads=2,
    text_width=32,
    text_mlp=64,
    text_layers=2,
    text_heads=2,
    text_kv_heads=2,
    max_positions=256,
)
STAGE = StageConfig(
    kind="captioner",
    template="vicuna_v1",
    geometry="pad",
    trainable=FreezePlan(projector=True, language_model=True, vision_from_block=1),
    learning_rate=5e-3,
    global_batch=8,
    micro_batch=4,
    length_window=0,
    epochs=3.0,
    weight_decay=0.01,
    clip_norm=1.0,
    max_length=200,
    dtype="float32",
    export_dtype="float32",
    zero_stage=2,
    gradient_checkpointing=False,
    save_every_steps=5,
    budget=RejectBudget(max_reject_rate=0.1),
)


def _samples(folder: Path, text_every: int) -> Iterator[Sample]:
    for i in range(60):
        colour = COLOURS[i % len(COLOURS)]
        file = folder / f"{i}.png"
        Image.new("RGB", (20, 10 + i % 5), colour).save(file)
        if i == 7:
            file.write_bytes(file.read_bytes()[:40])  # the one broken image
        turns = (
            Turn(role="user", text="Which colour?"),
            Turn(role="assistant", text=" ".join([colour] * (1 + i % 3))),
        )
        yield Sample(
            id=str(i),
            source="test",
            uri=None if i % text_every == 3 % text_every else str(file),
            turns=turns,
        )


@dataclass(frozen=True)
class Site:
    """A root with a dataset, and a tokenizer beside it."""

    root: Path
    tokenizer: Path
    model: ModelConfig = TINY
    dataset: Ref = DATASET

    @property
    def storage(self) -> Storage:
        return Storage(str(self.root))

    def where(self, workers: int = 2) -> Where:
        return Where(root=str(self.root), train_workers=workers, worker_cpus=0.5)

    def fresh(self) -> Fresh:
        return Fresh(model=self.model, tokenizer_file=str(self.tokenizer), seed=3)

    def commit_model(self, name: str, *, dtype: str) -> ModelSource:
        """Commit the model with random weights of this dtype."""
        from sg4v_ray.model import weights  # not where only the driver's side is needed

        ref, folder = Ref(name=name), self.root.parent / name
        weights.save(weights.create(self.model, seed=3), folder, dtype=dtype)
        (folder / "tokenizer.json").write_bytes(self.tokenizer.read_bytes())
        home = begin(self.storage, ref, {"dtype": dtype})
        with hold(home) as lease:
            digests = home.upload(folder, MODEL_FOLDER)
            commit(
                self.storage,
                ref,
                config={"dtype": dtype},
                inputs={},
                counts={},
                digests=digests,
                metrics={"model": to_plain(self.model)},
                lease=lease,
            )
        return ModelSource(root=str(self.root), ref=ref)

    def run(self, name: str, stage: StageConfig = STAGE, *, workers: int = 2) -> Manifest:
        return launch.run(
            stage,
            start=self.fresh(),
            dataset=self.dataset,
            out=Ref(name=name),
            where=self.where(workers),
        )

    def weights(self, name: str) -> dict[str, Tensor]:
        folder = self.root / name / "v1" / "model"
        (file,) = folder.glob("*.safetensors")
        return safetensors.torch.load_file(file)


def make_site(folder: Path, tokenizer: Path, *, text_every: int = 10) -> Site:
    """Commit the dataset below `folder`; every so many samples have no image."""
    images = folder / "images"
    images.mkdir()
    site = Site(folder / "root", tokenizer)
    home = begin(site.storage, DATASET, {"made": "by hand"})
    staging = folder / "staging"
    staging.mkdir()
    with pa.ipc.new_file(str(staging / "samples.arrow"), schema(Sample)) as writer:
        rows = list(_samples(images, text_every))
        for start in range(0, len(rows), 25):  # several record batches, as large datasets have
            writer.write_table(to_table(Sample, rows[start : start + 25]))
    with hold(home) as lease:
        commit(
            site.storage,
            DATASET,
            config={"made": "by hand"},
            inputs={},
            counts={"samples": 60},
            digests=site.storage.upload(staging, DATASET.path),
            lease=lease,
        )
    return site
