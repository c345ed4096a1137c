# SPDX-License-Identifier: Apache-2.0
"""Training in processes of this machine, as Ray Train's workers are but without Ray.

    python -m tests.with_ray.ranks PHASE.pickle RANK

A phase is a run with some number of ranks that may end before its plan does.
"""

import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from sg4v_ray.core.artifact import Ref
from sg4v_ray.exactly_once.config import ModelSource
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.progress import Progress
from tests.waiting import free_port
from tests.with_ray.training_site import Site

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Phase:
    """A run of some ranks, to be stopped after a step; at 0 when it is ready for the first."""

    site: Site
    name: str
    stage: StageConfig
    world_size: int
    stop_at: int | None
    step_deadline_s: float = 60.0
    spoil: tuple[int, int, float] | None = None
    """Rank, step, and the factor of that rank's part of the loss in it."""
    start: ModelSource | int = 3
    port: int = field(default_factory=free_port)


def run_phase(phase: Phase) -> Progress:
    """Run a phase to its end and return how far it came; a hang ends by its step's deadline."""
    made: Progress = pickle.loads(_run(phase).with_suffix(".progress").read_bytes())
    return made


def run_start(phase: Phase) -> list[int]:
    """Return how many bytes of its own memory each rank took, at most, until it was ready to train.

    Not counted are pages of files, which ranks share (RssAnon in proc(5)), nor what malloc would
    keep of tensors that are freed: up to 100 MB more, at some layouts of its heap.
    """
    file = _run(replace(phase, stop_at=0), MALLOC_MMAP_THRESHOLD_="1000000")
    return [int(file.with_suffix(f".rank{rank}").read_text()) for rank in range(phase.world_size)]


def _run(phase: Phase, **variables: str) -> Path:
    file = phase.site.root.parent / f"{uuid.uuid4().hex}.pickle"
    file.write_bytes(pickle.dumps(phase))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}
    # Not pipes: a rank whose full pipe nobody reads waits, and all others wait for it.
    errors = [file.with_suffix(f".{rank}.stderr") for rank in range(phase.world_size)]
    ranks = []
    for rank, error in enumerate(errors):
        with error.open("w") as stderr:
            command = [sys.executable, "-m", "tests.with_ray.ranks", str(file), str(rank)]
            ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=stderr))
    try:
        for one in ranks:
            one.wait(timeout=580)
    finally:
        for one in ranks:
            one.kill()
    said = "\n".join(one.read_text()[-10_000:] for one in errors)
    assert all(one.returncode == 0 for one in ranks), said
    return file


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def _growth(make: Callable[[], T]) -> tuple[T, int]:
    """Return what a function makes, and by how much this process's own memory grew meanwhile."""
    before, done = _own_bytes(), Event()

    def peak() -> int:
        most = before
        while not done.wait(0.01):
            most = max(most, _own_bytes())
        return most

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(peak)
        try:
            made = make()
        finally:
            done.set()
        return made, found.result() - before


def _spoil(what: tuple[int, int, float]) -> None:
    """Multiply this rank's part of the loss in one step."""
    from sg4v_ray.training import loop

    _, at, factor = what
    step, loss_sum, now = loop._step, loop._loss_sum, [-1]

    def noted(made: Any, batches: Any, progress: Progress, *, labels: int) -> Any:
        now[0] = progress.step
        return step(made, batches, progress, labels=labels)

    def spoilt(made: Any, batch: Any) -> Any:
        return loss_sum(made, batch) * (factor if now[0] == at else 1.0)

    loop._step, loop._loss_sum = noted, spoilt


def _main(file: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    from sg4v_ray.training import metrics
    from sg4v_ray.training.job import Job
    from sg4v_ray.training.lengths import TOKENIZER
    from sg4v_ray.training.loop import train
    from sg4v_ray.training.metrics import Metrics
    from sg4v_ray.training.signals import Word
    from sg4v_ray.training.worker import make_loop, prepare

    phase: Phase = pickle.loads(file.read_bytes())
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{phase.port}",
        rank=rank,
        world_size=phase.world_size,
    )
    metrics.REPORT_EVERY_S = 0.0

    class Stopped(Exception):
        pass

    class Listener:
        def report(self, metrics: Metrics) -> None:
            self.step = metrics.step

        def should_save(self) -> bool:
            return self.step == phase.stop_at

        def asked(self) -> Word:
            return Word.NOTHING

    home = phase.site.storage.sub(Ref(name=phase.name).path)
    if rank == 0:
        home.put(TOKENIZER, phase.site.tokenizer.read_bytes())
    dist.barrier()
    job = Job(
        stage=phase.stage,
        model=phase.site.model,
        start=phase.start,
        dataset=phase.site.dataset,
        root=str(phase.site.root),
        out=Ref(name=phase.name),
        threads=1,
        step_deadline_s=phase.step_deadline_s,
        gpu=False,
        progress=False,
    )
    folder = phase.site.root.parent / "models" / f"{phase.name}-{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    made, growth = _growth(
        lambda: make_loop(job, home, folder, prepare(job, home, folder), Listener())
    )
    file.with_suffix(f".rank{rank}").write_text(str(growth))
    if phase.spoil is not None and phase.spoil[0] == rank:
        _spoil(phase.spoil)
    if phase.stop_at is not None:
        begin = made.checkpoints.begin

        def last(progress: Progress) -> None:
            begin(progress)
            if progress.step == phase.stop_at:
                made.checkpoints.finish()
                raise Stopped(progress)

        made.checkpoints.begin = last  # type: ignore[method-assign]
    try:
        progress = Progress() if phase.stop_at == 0 else train(made)
    except Stopped as stopped:
        (progress,) = stopped.args
    if rank == 0:
        file.with_suffix(".progress").write_bytes(pickle.dumps(progress))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
