# SPDX-License-Identifier: Apache-2.0
"""A run's own rates mean what the words say."""

from collections import Counter

import pytest

from sg4v_ray.model.config import llava_7b
from sg4v_ray.recipes.sharegpt4v import DATA, RUNS, align, finetune
from sg4v_ray.training.cluster import tflops_of
from sg4v_ray.training.estimate import mfu_of
from sg4v_ray.training.metrics import Pace, Work

pytestmark = pytest.mark.training


def test_the_utilisation_of_a_run_is_the_one_that_an_estimate_gives_it() -> None:
    stage, data, run = finetune(), DATA["finetune"], RUNS["7b", "finetune"]
    work = Work(model=llava_7b(), trainable=stage.trainable, tflops=312)
    images = data.samples * data.images
    tokens = data.samples * data.text_tokens + images * llava_7b().num_image_tokens
    counts = Counter(samples=data.samples, images=round(images), tokens=round(tokens))
    found = work.mfu(counts, run.hours * 3600, workers=run.gpus)
    assert found == pytest.approx(mfu_of(run, stage, llava_7b(), data), rel=1e-3)


def test_a_device_that_nobody_has_figures_of_has_no_utilisation() -> None:
    work = Work(model=llava_7b(), trainable=finetune().trainable, tflops=None)
    assert work.mfu(Counter(samples=1, tokens=700, images=1), 1.0, workers=1) is None


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L4", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_gives_it(device: str, tflops: float | None) -> None:
    assert tflops_of(device) == tflops


def test_waiting_is_what_passes_before_a_batch_comes_and_not_what_is_done_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def batches() -> object:
        nonlocal now
        for number in range(3):
            now += 2.0
            yield number

    work = Work(model=llava_7b(), trainable=align().trainable, tflops=None)
    pace = Pace(0, workers=1, work=work)
    waits = []
    for _ in pace.waiting_for(batches()):  # type: ignore[arg-type]
        now += 100.0
        waits.append(pace.last_wait_s)
    assert waits == [2.0, 2.0, 2.0]
