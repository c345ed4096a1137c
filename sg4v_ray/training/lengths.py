# SPDX-License-Identifier: Apache-2.0
"""How long every row of a dataset will be, measured once by the whole cluster before training.

dataset@v, tokenizer -> start/lengths.arrow beside the checkpoints
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import ray
from tqdm import tqdm

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.storage import Storage
from sg4v_ray.model.conversation import Conversation, TemplateName
from sg4v_ray.training.plan import Lengths
from sg4v_ray.training.samples import open_samples

TOKENIZER: Final = "start/tokenizer.json"
_FILE: Final = "start/lengths.arrow"
_AT_ONCE: Final = 10_000
"""Samples of one task: some seconds of work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruler:
    """What decides the length of a row."""

    root: str
    dataset: Ref
    home: str
    """Folder of the artifact that is trained; its tokenizer is there."""
    template: TemplateName
    num_image_tokens: int
    max_length: int

    def measure(self, start: int, stop: int) -> Lengths:
        """Return the lengths of the samples from `start` to before `stop`."""
        samples = open_samples(Storage(self.root), self.dataset)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tokenizer.json").write_bytes(Storage(self.home).get(TOKENIZER))
            conversation = Conversation.open(Path(folder), self.template)
        tokens = np.empty(stop - start, np.int32)
        has_image = np.empty(stop - start, np.bool_)
        for place, index in enumerate(range(start, stop)):
            sample = samples[index]
            has_image[place] = sample.uri is not None
            images = int(has_image[place])
            size = len(conversation.sample(sample.turns, num_images=images).token_ids)
            tokens[place] = min(size + images * (self.num_image_tokens - 1), self.max_length)
        return Lengths(tokens, has_image)


def measure(ruler: Ruler, num_samples: int, *, show: bool) -> None:
    """Write the lengths of all samples, unless an earlier run has.

    Args:
        num_samples: of the dataset.
        show: draw a progress bar.
    """
    home = Storage(ruler.home)
    if home.exists(_FILE):
        return
    starts = range(0, num_samples, _AT_ONCE)
    task = ray.remote(num_cpus=1)(Ruler.measure)
    running = [task.remote(ruler, one, min(one + _AT_ONCE, num_samples)) for one in starts]
    parts = [
        ray.get(one) for one in tqdm(running, desc="token lengths", unit="part", disable=not show)
    ]
    table = pa.table(
        {
            "tokens": np.concatenate([one.tokens for one in parts]),
            "has_image": np.concatenate([one.has_image for one in parts]),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    home.put(_FILE, sink.getvalue().to_pybytes())


def read_lengths(home: Storage) -> Lengths:
    """Return what `measure` wrote."""
    table = pa.ipc.open_file(pa.BufferReader(home.get(_FILE))).read_all()
    return Lengths(
        table["tokens"].to_numpy().astype(np.int32), table["has_image"].to_numpy().astype(np.bool_)
    )
