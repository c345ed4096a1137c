# SPDX-License-Identifier: Apache-2.0
"""An estimate as tables, and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from sg4v_ray.core.text_table import text_table
from sg4v_ray.model.size import Parameters
from sg4v_ray.recipes.sharegpt4v import Planned
from sg4v_ray.training.cluster import GB, Captioning, Cluster, TeacherCaptions
from sg4v_ray.training.estimate import Estimate, Memory, Run, busy_micro_batch

_PUBLISHED_CAPTIONING: Final = "44 A100-days for 1.2M"
_ASSUMED: Final = (
    "A stage without a published run is taken to be as efficient as the 7B run of its kind, or "
    "else as 7B pretraining; GPUs of another kind as A100s. Give --mfu once you measured yours."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What is printed."""

    cluster: Cluster
    stages: tuple[tuple[Planned, Estimate], ...]
    teacher: TeacherCaptions | None
    captioning: Captioning | None


def as_json(report: Report) -> dict[str, Any]:
    """Return plain values: bytes, hours, dollars."""
    return {
        "cluster": {**asdict(report.cluster), "gpus": report.cluster.gpus},
        "stages": [_stage_json(plan, made) for plan, made in report.stages],
        "teacher": None if report.teacher is None else asdict(report.teacher),
        "captioning": None if report.captioning is None else asdict(report.captioning),
    }


def _stage_json(plan: Planned, made: Estimate) -> dict[str, Any]:
    own = {one.name: getattr(made, one.name) for one in fields(made)}
    return {
        "stage": plan.stage.kind,
        "model": plan.model.name,
        "config": asdict(plan.stage),
        "data": asdict(plan.data),
        "published": None if plan.published is None else asdict(plan.published),
        "published_mfu": plan.published_mfu,
        **own,
        "parameters": asdict(made.parameters),
        "trainable": asdict(made.trainable),
        "memory": {**asdict(made.memory), "total": made.memory.total},
        "remedies": [
            {"change": one.change, "memory": {**asdict(one.memory), "total": one.memory.total}}
            for one in made.remedies
        ],
    }


def as_text(report: Report) -> str:
    """Return tables, and in words what does not fit or stands idle."""
    cluster, gpu = report.cluster, report.cluster.kind
    head = (
        f"{cluster.gpus} x {cluster.gpu} ({cluster.nodes} nodes of {cluster.gpus_per_node}): "
        f"{gpu.memory_gb:g} GB each, {cluster.usable_bytes / GB:.1f} GB to plan with; "
        f"{gpu.tflops:g} bf16 TFLOP/s each"
    )
    warnings = [text for one in report.stages for text in _warnings(*one, cluster)]
    tables = [_parameters(report), _memory(report), *warnings, _time(report), *_captions(report)]
    host = max(made.host_bytes for _, made in report.stages) / GB
    on_hosts = (
        f"The weights take up to {host:.0f} GB of a node's own memory: a model in each process, "
        "under ZeRO-3 one for the export."
    )
    return "\n\n".join([head, *tables, on_hosts, _ASSUMED])


def _parameters(report: Report) -> str:
    lines = [("parameters", "vision tower", "projector", "language model", "head", "all")]
    rows: list[tuple[str, Parameters]] = [("all", report.stages[0][1].parameters)]
    rows += [(f"{plan.stage.kind} trains", made.trainable) for plan, made in report.stages]
    for name, count in rows:
        parts = (count.vision_tower, count.projector, count.language_model, count.head)
        cells = [f"{number:,}" for number in (*parts, count.total)]
        lines.append((name, cells[0], cells[1], cells[2], cells[3], cells[4]))
    return text_table(lines)


def _memory(report: Report) -> str:
    parts = [one.name for one in fields(Memory)]
    """Memory of a micro-batch of the longest rows."""
    lines = [["GB a GPU", "ZeRO", "rows", "of tokens", *parts, "all", "fits"]]
    for plan, made in report.stages:
        cells = [f"{getattr(made.memory, part) / GB:.1f}" for part in parts]
        stage = plan.stage
        how = [str(stage.zero_stage), str(stage.micro_batch), f"{stage.max_length:,}"]
        fits = "yes" if made.fits else "NO"
        lines.append([plan.stage.kind, *how, *cells, f"{made.memory.total / GB:.1f}", fits])
    return text_table(lines)


def _warnings(plan: Planned, made: Estimate, cluster: Cluster) -> Iterator[str]:
    stage = plan.stage
    if not made.fits:
        needs = made.memory.total / GB
        has = cluster.usable_bytes / GB
        then = "It fits with one of" if made.remedies else "No setting makes it fit: larger GPUs do"
        ways = [f"  {one.change}: {one.memory.total / GB:.1f} GB" for one in made.remedies]
        yield "\n".join([f"{stage.kind} does NOT fit: {needs:.1f} of {has:.1f} GB. {then}:", *ways])
    if made.busy < 1:
        size = busy_micro_batch(stage, cluster.gpus)
        yield (
            f"{stage.kind} leaves {1 - made.busy:.0%} of the GPUs idle: {stage.global_batch} "
            f"samples in micro-batches of {stage.micro_batch} do not share out over "
            f"{cluster.gpus} GPUs. "
            + ("Take another number of GPUs" if size is None else f"Take --micro-batch {size}")
        )


def _time(report: Report) -> str:
    head = ["time", "samples", "steps", "TFLOP a sample", "MFU", "hours", "GPU-hours", "USD"]
    lines = [[*head, "published run", "its MFU"]]
    for plan, made in report.stages:
        run = plan.published
        lines.append(
            [
                plan.stage.kind,
                f"{plan.data.samples:,}",
                f"{made.steps:,}",
                f"{made.tflops_per_sample:,.2f}",
                f"{made.mfu:.1%}",
                f"{made.hours:,.1f}",
                f"{made.hours * report.cluster.gpus:,.0f}",
                _usd(made.usd),
                "none" if run is None else _run(run),
                "" if run is None else f"{plan.published_mfu:.1%}",
            ]
        )
    return text_table(lines)


def _captions(report: Report) -> Iterator[str]:
    if report.captioning is not None:
        bulk = report.captioning
        yield text_table(
            [
                ["captioning", "images/s a GPU", "hours", "GPU-hours", "USD", "published run"],
                [
                    f"{bulk.images:,} images",
                    f"{bulk.images_per_gpu_s:.2f}",
                    f"{bulk.hours:,.1f}",
                    f"{bulk.hours * bulk.gpus:,.0f}",
                    _usd(bulk.usd),
                    _PUBLISHED_CAPTIONING,
                ],
            ]
        )
    if report.teacher is not None:
        asked = report.teacher
        yield text_table(
            [
                ["teacher captions", "prompt tokens", "answer tokens", "USD"],
                [
                    f"{asked.images:,} images",
                    f"{asked.prompt_tokens:,}",
                    f"{asked.completion_tokens:,}",
                    _usd(asked.usd),
                ],
            ]
        )


def _run(run: Run) -> str:
    return f"{run.hours:g} h on {run.gpus} {run.gpu}"


def _usd(usd: float | None) -> str:
    return "no price given" if usd is None else f"{usd:,.0f}"
