# SPDX-License-Identifier: Apache-2.0
"""What a training run says of itself while it works."""

import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from sg4v_ray.model.config import ModelConfig
from sg4v_ray.model.freeze import FreezePlan
from sg4v_ray.model.size import count_flops
from sg4v_ray.training.plan import Plan
from sg4v_ray.training.progress import Progress
from sg4v_ray.training.signals import Word

T = TypeVar("T")
REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What a run says now and then; rates and shares are those since it last said something."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    held_out_loss: float | None
    """The last one that was looked at."""
    samples_per_s: float
    samples_per_s_per_worker: float
    tokens_per_s: float
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None where nobody knows what the device can do."""
    padding_share: float
    """Positions that hold no token, of all that were computed."""
    data_wait_share: float
    """Time that rank 0 waited for its next batch, of all."""
    memory_gb: float
    """Most that rank 0 has held: of its GPU, or of the host where there is none."""
    eta_s: float
    rejected: int
    skipped: int
    """Steps that were not applied (`training.guard`)."""
    rollbacks: int
    """Times that the weights went back to a checkpoint."""


class Monitor(Protocol):
    """What the loop tells and asks its surroundings; all ranks call it equally often."""

    def report(self, metrics: Metrics) -> None:
        """Take the metrics of the last step."""

    def should_save(self) -> bool:
        """Say, once, that a machine of this run will soon be taken away."""

    def asked(self) -> Word:
        """Return what a signal to the driver asks, once each; only rank 0's answer counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a sample costs, and what one worker's device could do."""

    model: ModelConfig
    trainable: FreezePlan
    tflops: float | None
    """Of the device, dense bfloat16."""

    def mfu(self, counts: Counter[str], seconds: float, *, workers: int) -> float | None:
        """Return the model FLOPs utilisation of samples that took some seconds.

        Source:
            PaLM (Chowdhery et al. 2022), appendix B: what is computed again does not count.
        """
        samples = counts["samples"]
        if self.tflops is None or not samples:
            return None
        images = counts["images"]
        text = counts["tokens"] - images * self.model.num_image_tokens
        flops = count_flops(
            self.model,
            self.trainable,
            text_tokens=max(0, text) / samples,
            images=images / samples,
            checkpointing=False,
        )
        return samples * flops.model / (seconds * workers * self.tflops * 1e12)


def memory_gb(device: torch.device) -> float:
    """Return the most that this process has held on a device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # kilobytes on Linux


class Pace:
    """Rates since the last report, and how long the rest will take."""

    def __init__(self, first_step: int, *, workers: int, work: Work) -> None:
        self._first_step, self._workers, self._work = first_step, workers, work
        self._started = self._reported = self._lapped = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._waited = 0.0
        self.last_wait_s = 0.0
        """Seconds that the last step waited for its batch."""

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same, and note how long each took to come."""
        began = time.monotonic()
        for one in batches:
            self.last_wait_s = time.monotonic() - began
            self._waited += self.last_wait_s
            yield one
            began = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since it was asked last, or since the run began: nothing is left out,
        neither waiting nor what was reported, looked at or saved after the step before.
        """
        before, self._lapped = self._lapped, time.monotonic()
        return self._lapped - before

    def is_time(self) -> bool:
        """Say whether a report is due."""
        return time.monotonic() - self._reported >= REPORT_EVERY_S

    def add(self, counts: Counter[str]) -> None:
        """Count what a step held, over all ranks."""
        self._counts += counts

    def metrics(
        self, progress: Progress, plan: Plan, *, learning_rate: float, device: torch.device
    ) -> Metrics:
        """Return what to say now, and begin anew."""
        now, counts = time.monotonic(), self._counts
        seconds = max(1e-9, now - self._reported)
        per_step = (now - self._started) / (progress.step - self._first_step)
        positions = max(1, counts["tokens"] + counts["padding"])
        made = Metrics(
            step=progress.step,
            total_steps=plan.total_steps,
            epoch=progress.step / plan.steps_per_epoch,
            loss=progress.losses[-1],
            learning_rate=learning_rate,
            grad_norm=progress.grad_norms[-1],
            held_out_loss=progress.held_out[-1].loss if progress.held_out else None,
            samples_per_s=counts["samples"] / seconds,
            samples_per_s_per_worker=counts["samples"] / seconds / self._workers,
            tokens_per_s=counts["tokens"] / seconds,
            mfu=self._work.mfu(counts, seconds, workers=self._workers),
            padding_share=counts["padding"] / positions,
            data_wait_share=self._waited / seconds,
            memory_gb=memory_gb(device),
            eta_s=per_step * (plan.total_steps - progress.step),
            rejected=progress.counts.get("rejected", 0),
            skipped=len(progress.skipped),
            rollbacks=len(progress.rollbacks),
        )
        self._reported, self._waited, self._counts = now, 0.0, Counter()
        return made
