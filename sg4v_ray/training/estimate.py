# SPDX-License-Identifier: Apache-2.0
"""What a training stage takes before it runs: memory of a GPU, hours, dollars.

StageConfig + ModelConfig + Data + Cluster -> Estimate. Plain arithmetic: no torch, no Ray, no GPU.
Memory is that of the longest micro-batch the stage allows, hours are those of the mean sample.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Final, Literal

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.model.size import (
    Activations,
    Parameters,
    count_activations,
    count_flops,
    count_parameters,
    count_trainable,
)
from sg4v_ray.training.cluster import KNOWN_GPUS, Cluster
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.plan import total_steps

LIVE_PARAMETERS: Final = 1_000_000_000
"""Parameters that ZeRO-3 holds gathered at once, at most: `stage3_max_live_parameters` of
training/deepspeed.py. The prefetched ones count among them."""
BUCKET: Final = 500_000_000
"""Gradients that are reduced together: `reduce_bucket_size`, DeepSpeed 0.19.8's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a stage trains on."""

    samples: int
    text_tokens: float
    """Mean of a sample, image tokens not included."""
    images: float = 1.0
    """Mean of a sample: the share that has one."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.text_tokens < 0 or not 0 <= self.images <= 1:
            raise ConfigError(f"samples must be 1 or more, images a share from 0 to 1, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run that somebody published."""

    gpu: str
    gpus: int
    hours: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one GPU, by part."""

    weights: float
    gradients: float
    optimizer: float
    """Float32 master weights and two moments."""
    activations: float
    """At their peak, in a micro-batch of rows of `max_length`."""
    buffers: float
    """DeepSpeed's: gradients on their way and, in ZeRO-3, parameters that are gathered."""

    @property
    def total(self) -> float:
        """All of them."""
        return math.fsum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change with which a stage fits, and what it takes then."""

    change: str
    """In words; several settings only where no single one is enough."""
    stage: StageConfig
    cluster: Cluster
    memory: Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a stage takes on a cluster."""

    parameters: Parameters
    trainable: Parameters
    memory: Memory
    fits: bool
    remedies: tuple[Remedy, ...]
    """Empty if it fits, or if nothing of ours makes it fit."""
    host_bytes: float
    """Host memory of a node for weights, at most: of the whole model in each process; under ZeRO-3
    once, for the export: before it processes share the mapped files and shard them one parameter
    at a time."""
    steps: int
    tflops_per_sample: float
    """Of the model: forward and backward, without what is computed again."""
    busy: float
    """Share of the GPUs that have a micro-batch, 0 to 1."""
    mfu: float
    hours: float
    usd: float | None


def estimate(
    stage: StageConfig, model: ModelConfig, *, data: Data, cluster: Cluster, mfu: float
) -> Estimate:
    """Return what a stage takes.

    Args:
        mfu: model FLOPs utilisation, 0 to 1; `mfu_of` derives it from a run of the same kind.

    Raises:
        ConfigError: `mfu` is no share, or the stage trains a vision block that gets no gradient.
    """
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu must be above 0 and at most 1, got {mfu:g}; 0.2 to 0.5 is usual")
    text_only = data.images < 1
    memory = memory_of(stage, model, cluster, text_only=text_only)
    fits = memory.total <= cluster.usable_bytes
    steps = total_steps(
        num_samples=data.samples,
        global_batch=stage.global_batch,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    copies = 1 if stage.zero_stage == 3 else cluster.gpus_per_node
    busy = busy_share(stage, cluster.gpus)
    flops = _flops(stage, model, data)
    samples = steps / math.ceil(data.samples / stage.global_batch) * data.samples
    speed = mfu * cluster.kind.tflops * 1e12 * cluster.gpus * busy
    hours = samples * flops / speed / 3600
    return Estimate(
        parameters=count_parameters(model),
        trainable=count_trainable(model, stage.trainable),
        memory=memory,
        fits=fits,
        remedies=() if fits else remedies(stage, model, cluster, text_only=text_only),
        host_bytes=copies * _number_bytes(stage) * count_parameters(model).total,
        steps=steps,
        tflops_per_sample=flops / 1e12,
        busy=busy,
        mfu=mfu,
        hours=hours,
        usd=cluster.usd(hours),
    )


def mfu_of(run: Run, stage: StageConfig, model: ModelConfig, data: Data) -> float:
    """Return the model FLOPs utilisation of a published run of this stage.

    Padding counts as idleness, and so does everything else that took hours: loading, evaluation,
    saving.
    """
    done = data.samples * stage.epochs * _flops(stage, model, data)
    return done / (run.hours * 3600 * run.gpus * KNOWN_GPUS[run.gpu].tflops * 1e12)


def memory_of(
    stage: StageConfig, model: ModelConfig, cluster: Cluster, *, text_only: bool = False
) -> Memory:
    """Return the bytes that one GPU holds at the worst moment of a step.

    Args:
        text_only: there are micro-batches without an image; a row with one joins them.

    Source:
        ZeRO (Rajbhandari et al. 2020), section 3.1: with Adam in mixed precision 2 bytes a
        parameter for weights, 2 for gradients, 12 for optimizer states; stage 1 shards the last
        over the GPUs, stage 2 gradients too, stage 3 weights too. In float32 DeepSpeed keeps
        master weights beside the weights from stage 1 on, and torch's AdamW none.
    """
    number = _number_bytes(stage)
    total = count_parameters(model).total
    trained = count_trainable(model, stage.trainable).total
    by_stage = [1 if stage.zero_stage < first else cluster.gpus for first in (3, 2, 1)]
    states = 8 if stage.dtype == "float32" and stage.zero_stage == 0 else 12
    return Memory(
        weights=number * total / by_stage[0],
        gradients=number * trained / by_stage[1],
        optimizer=states * trained / by_stage[2],
        activations=activations_of(stage, model, text_only=text_only).peak,
        buffers=number * _buffered(stage, total=total, trained=trained, gpus=cluster.gpus),
    )


def activations_of(
    stage: StageConfig, model: ModelConfig, *, text_only: bool = False
) -> Activations:
    """Return the bytes of activations of the longest micro-batch: every row of `max_length`."""
    tokens = (stage.micro_batch + text_only) * stage.max_length
    if stage.micro_tokens is not None:
        tokens = min(tokens, max(stage.micro_tokens, stage.max_length))
    return count_activations(
        model,
        stage.trainable,
        tokens=tokens,
        images=stage.micro_batch,
        number_bytes=_number_bytes(stage),
        checkpointing=stage.gradient_checkpointing,
    )


def busy_share(stage: StageConfig, gpus: int) -> float:
    """Return the share of GPUs that work: where micro-batches are too few, some get fillers."""
    micro_batches = math.ceil(stage.global_batch / stage.micro_batch)
    return micro_batches / (math.ceil(micro_batches / gpus) * gpus)


def busy_micro_batch(stage: StageConfig, gpus: int) -> int | None:
    """Return the largest micro-batch, up to the stage's, that keeps all GPUs busy, if any does."""
    for size in _divisors(stage.global_batch, at_most=stage.micro_batch):
        if busy_share(replace(stage, micro_batch=size), gpus) == 1:
            return size
    return None


def remedies(
    stage: StageConfig, model: ModelConfig, cluster: Cluster, *, text_only: bool = False
) -> tuple[Remedy, ...]:
    """Return each one-setting change that makes a stage fit, the mildest first.

    Where no single one is enough: all of them together, with as few more GPUs as possible.
    """

    def first_that_fits(changes: Iterator[_Change]) -> list[Remedy]:
        for what, changed, on in changes:
            memory = memory_of(changed, model, on, text_only=text_only)
            if memory.total <= on.usable_bytes:
                return [Remedy(change=what, stage=changed, cluster=on, memory=memory)]
        return []

    single = [one for kind in _CHANGES for one in first_that_fits(kind(stage, cluster))]
    return tuple(single or first_that_fits(_all_changes(stage, cluster)))


_Change = tuple[str, StageConfig, Cluster]


def _checkpointing(stage: StageConfig, cluster: Cluster) -> Iterator[_Change]:
    if not stage.gradient_checkpointing:
        yield "gradient_checkpointing on", replace(stage, gradient_checkpointing=True), cluster


def _micro_batch(stage: StageConfig, cluster: Cluster) -> Iterator[_Change]:
    for size in _divisors(stage.global_batch, at_most=stage.micro_batch - 1):
        rounds = math.ceil(stage.global_batch / size / cluster.gpus)
        what = f"micro_batch {size} ({rounds} a step)"
        yield what, replace(stage, micro_batch=size), cluster


def _zero_stage(stage: StageConfig, cluster: Cluster) -> Iterator[_Change]:
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    for zero in stages[stage.zero_stage + 1 :]:
        yield f"zero_stage {zero}", replace(stage, zero_stage=zero), cluster


def _more_gpus(stage: StageConfig, cluster: Cluster) -> Iterator[_Change]:
    nodes = 2 * cluster.nodes
    while nodes * cluster.gpus_per_node <= stage.global_batch:  # beyond it they have no sample
        larger = replace(cluster, nodes=nodes)
        yield f"{larger.gpus} GPUs (cluster.nodes {nodes})", stage, larger
        nodes *= 2


_CHANGES: Final[tuple[Callable[[StageConfig, Cluster], Iterator[_Change]], ...]] = (
    _checkpointing,
    _micro_batch,
    _zero_stage,
    _more_gpus,
)


def _all_changes(stage: StageConfig, cluster: Cluster) -> Iterator[_Change]:
    least = replace(stage, gradient_checkpointing=True, zero_stage=3, micro_batch=1)
    what = "gradient_checkpointing on, micro_batch 1, zero_stage 3"
    yield what, least, cluster
    for more, changed, larger in _more_gpus(least, cluster):
        yield f"{what}, {more}", changed, larger


def _buffered(stage: StageConfig, *, total: int, trained: int, gpus: int) -> float:
    """Return the numbers in DeepSpeed's buffers with the settings of training/deepspeed.py.

    Stage 0 flattens gradients bucket by bucket; from stage 1 on one bucket is allocated, and two
    in stage 2, whose `overlap_comm` fills one while the other is reduced: on a single GPU too
    (`setup_buckets` of DeepSpeed 0.19.8), where nothing has to be gathered.
    """
    if stage.zero_stage == 0:
        return min(BUCKET, trained) if gpus > 1 else 0
    if stage.zero_stage == 3:
        return BUCKET + (min(LIVE_PARAMETERS, total) if gpus > 1 else 0)
    return BUCKET * stage.zero_stage


def _divisors(number: int, *, at_most: int) -> Iterator[int]:
    return (size for size in range(at_most, 0, -1) if number % size == 0)


def _flops(stage: StageConfig, model: ModelConfig, data: Data) -> float:
    return count_flops(
        model,
        stage.trainable,
        text_tokens=data.text_tokens,
        images=data.images,
        checkpointing=stage.gradient_checkpointing,
    ).model


def _number_bytes(stage: StageConfig) -> int:
    return 2 if stage.dtype == "bfloat16" else 4
