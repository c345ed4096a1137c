# SPDX-License-Identifier: Apache-2.0
"""Ray job: run every step of a recipe in order; what is committed is skipped.

python -m jobs.run_all RECIPE [--where.root PATH_OR_URI] [flags]
ray job submit --working-dir . -- python -m jobs.run_all RECIPE --where.root $PWD/runs
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from jobs import _steps
from jobs._cli import main, parse, ray_session, summary
from sg4v_ray.core.artifact import Manifest
from sg4v_ray.core.where import Where
from sg4v_ray.recipes.line import Line, TrainStep

_log = logging.getLogger("sg4v_ray.jobs")


def plan(line: Line, where: Where) -> Iterator[Callable[[], Manifest]]:
    """Yield the steps of a line so that each finds its inputs finished.

    A dataset is built right before the training that reads it; where nothing is trained, last. A
    teacher is asked (and paid) only where something is trained on its captions.
    """
    for index in line.images:
        yield partial(_steps.index_images, index, where)
    for questions in line.questions:
        yield partial(_steps.index_questions, questions, where)
    if line.collect is not None and (line.align or line.captioner):
        yield partial(_steps.collect_captions, line.collect, where)
    if line.mix is not None:
        yield partial(_steps.mix_dataset, line.mix, where)
    yield from _training(line, (line.align, line.captioner), where)
    if line.caption is not None:
        yield partial(_steps.caption_images, line.caption, where)
    yield from _training(line, (line.pretrain, line.finetune), where)
    if not any((line.align, line.captioner, line.pretrain, line.finetune)):
        for dataset in line.datasets:
            yield partial(_steps.build_dataset, dataset, where)
    if line.evaluate is not None:
        yield partial(_steps.evaluate, line.evaluate, where)


def _training(
    line: Line, trainings: tuple[TrainStep | None, ...], where: Where
) -> Iterator[Callable[[], Manifest]]:
    datasets = {step.out: step for step in line.datasets}
    for train in trainings:
        if train is not None:
            yield partial(_steps.build_dataset, datasets[train.dataset], where)
            yield partial(_steps.train, train, where)


def run() -> None:
    """Run the line with the flags of this process."""
    line, where = parse(__doc__, lambda line: line, sys.argv[1:])
    with ray_session(trains=True):
        for step in plan(line, where):
            started = time.monotonic()
            done = summary(step())
            print(f"{done} ({time.monotonic() - started:.0f} s)", flush=True)
    if line.evaluate is not None:
        print(f"scores: {where.storage.uri(line.evaluate.report)}")


if __name__ == "__main__":
    main(run)
