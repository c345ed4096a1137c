# SPDX-License-Identifier: Apache-2.0
"""What a training process grows by, measured in a process of its own.

    python -m tests.soak.training_memory FOLDER

Prints the bytes that became resident from before the model was made to the peak of two steps. The
checkpoint after them is not in it.
"""

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from jobs import _bench_training as bench
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes import nano_tokenizer
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.job import Job
from sg4v_ray.training.lengths import TOKENIZER
from sg4v_ray.training.loop import train
from sg4v_ray.training.metrics import Metrics
from sg4v_ray.training.signals import Word
from sg4v_ray.training.worker import make_loop, prepare

STEPS = 2
"""The first one makes the optimizer's moments."""


def stage() -> StageConfig:
    """Return a stage whose rows are all of full length, and whose gradients wait for a second
    micro-batch: then everything that the estimate adds up is there at one moment.
    """
    return replace(
        bench.stage(STEPS),
        micro_batch=4,
        global_batch=8,
        max_length=bench.MODEL.num_image_tokens + 60,  # no caption is shorter
        length_window=0,
    )


class StepsDone(Exception):
    """The steps are done, and nothing is saved yet."""


class Listener:
    """Ends a run after its last step."""

    def report(self, metrics: Metrics) -> None:
        if metrics.step == STEPS:
            raise StepsDone

    def should_save(self) -> bool:
        return False

    def asked(self) -> Word:
        return Word.NOTHING


def status(field: str) -> int:
    """Return the bytes of a line of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def grown() -> Iterator[list[int]]:
    """Fill a list with the bytes of anonymous memory that the peak of a block is above its start.

    The kernel's own peak (VmHWM, which 5 resets) misses no moment, as samples would. It counts
    mapped files too; those that were read meanwhile (code, the dataset) are no part of an estimate.
    """
    found: list[int] = []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, files = status("VmHWM"), status("RssFile")
    yield found
    found.append(status("VmHWM") - before - (status("RssFile") - files))


def run(root: Path) -> None:
    """Train as a worker of Ray Train does, from the model on."""
    job = Job(
        stage=stage(),
        model=bench.MODEL,
        start=bench.SEED,
        dataset=bench.DATASET,
        root=str(root),
        out=Ref(name="measured"),
        threads=1,
        step_deadline_s=600,
        gpu=False,
        progress=False,
    )
    home = Storage(job.root).sub(job.out.path)
    home.put(TOKENIZER, nano_tokenizer.file().read_bytes())
    folder = root / "model"
    folder.mkdir()
    train(make_loop(job, home, folder, prepare(job, home, folder), Listener()))


def main(root: Path) -> None:
    """Measure, and print bytes."""
    bench.prepare(root, STEPS * stage().global_batch // bench.stage(STEPS).global_batch)
    os.environ["LOCAL_RANK"] = "0"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with grown() as found:
        try:
            run(root)
        except StepsDone:
            print("done", file=sys.stderr)
    print(*found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
