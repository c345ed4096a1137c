# SPDX-License-Identifier: Apache-2.0
"""One training process: model and data in, the loop, and on rank 0 the finished model folder.

Ray Train runs `work` on every worker. What the driver needs to know comes back as a file beside
the checkpoints: it outlives both processes.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution import context as train_context
from ray.util.metrics import Gauge
from torch import Tensor

from sg4v_ray.core import observe
from sg4v_ray.core.config import to_plain
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.config import MODEL_FOLDER, ModelSource
from sg4v_ray.model import weights
from sg4v_ray.model.conversation import Conversation, chat_template
from sg4v_ray.model.freeze import freeze
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.model.processor import save_processor
from sg4v_ray.training.batch import KEPT_BYTES, Batches, RowRules, Rows
from sg4v_ray.training.checkpoint import Checkpoints
from sg4v_ray.training.cluster import tflops_of
from sg4v_ray.training.deepspeed import initialise
from sg4v_ray.training.guard import Guard
from sg4v_ray.training.job import OUTCOME, Job, Outcome, make_plan, one_epoch
from sg4v_ray.training.lengths import TOKENIZER, read_lengths
from sg4v_ray.training.loop import LASTING, Loop, least, train
from sg4v_ray.training.metrics import Metrics, Monitor, Work
from sg4v_ray.training.plan import Plan, unknown_lengths
from sg4v_ray.training.progress import Progress
from sg4v_ray.training.samples import Samples, open_samples
from sg4v_ray.training.schedule import Schedule
from sg4v_ray.training.signals import Inbox, Word, wishes
from sg4v_ray.training.tracker import Tracker, open_tracker

_log = logging.getLogger(__name__)


def work(job: Job) -> None:
    """Train as the job says; every training process calls this."""
    observe.set_up_logging()
    # Each report as a line from each rank. Ray names this logger by its file, so that
    # `ray.train.LoggingConfig` does not reach it.
    logging.getLogger(train_context.__file__).setLevel(logging.WARNING)
    torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision("high" if job.gpu else "highest")  # TF32, as published
    home = Storage(job.root).sub(job.out.path)
    with tempfile.TemporaryDirectory(prefix="sg4v-model-") as name:
        folder = Path(name)
        model = prepare(job, home, folder)
        rank = dist.get_rank()
        tracker = open_tracker(
            job.tracker if rank == 0 else "none",
            home,
            name=str(job.out),
            settings=to_plain(job.stage),
        )
        inbox = Inbox(wishes(home, job.attempt))
        monitor = _RayMonitor(str(job.out), tracker, inbox, rank=rank, show=job.progress)
        loop = make_loop(job, home, folder, model, monitor)
        try:
            with contextlib.closing(tracker), inbox:
                progress = train(loop)
            step = _step_to_export(job, loop, progress)
            outcome = Outcome(progress=progress, exported_step=step)
        except LASTING as error:
            outcome = Outcome(error=type(error).__name__, message=str(error))
        else:
            digests = _export(job, home, folder, model, loop.engine)
            outcome = dataclasses.replace(outcome, digests=digests)
        if dist.get_rank() == 0:
            home.put(OUTCOME, json.dumps(dataclasses.asdict(outcome)).encode())


def prepare(job: Job, home: Storage, folder: Path) -> Any:
    """Return the model, and put tokenizer and processor into the folder that will be exported."""
    stage = job.stage
    model: Any
    if isinstance(job.start, ModelSource):
        source = job.start.localise()
        # Sharding casts parameter by parameter; a whole model in another dtype than the files'
        # would be a copy in every rank.
        dtype = None if stage.zero_stage == 3 else stage.dtype
        model, tokenizer = weights.load(source, dtype=dtype), source / "tokenizer.json"
    else:
        model = weights.create(job.model, seed=job.start).to(weights.to_dtype(stage.dtype))
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_bytes(home.get(TOKENIZER))
    save_processor(
        folder,
        config=job.model,
        tokenizer_file=tokenizer,
        chat_template=chat_template(stage.template),
        geometry=stage.geometry,
    )
    freeze(model, stage.trainable)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # It lets embeddings require a gradient, as LoRA needs: a frozen tower would run backward.
        model.disable_input_require_grads()
    return model.train()


def make_loop(job: Job, home: Storage, folder: Path, model: Any, monitor: Monitor) -> Loop:
    """Return what `train` takes, of this rank of the process group.

    Args:
        job: what to train on, and how.
        home: storage of the artifact.
        folder: with tokenizer and processor, from `prepare`.
        model: from `prepare`.
        monitor: hears of the progress.
    """
    stage, world_size = job.stage, dist.get_world_size()
    samples = open_samples(Storage(job.root), job.dataset)
    rules = RowRules(
        geometry=stage.geometry,
        image_size=job.model.image_size,
        num_image_tokens=job.model.num_image_tokens,
        max_length=stage.max_length,
        image_limits=stage.image_limits,
    )
    lengths = read_lengths(home) if stage.length_window else unknown_lengths(len(samples))
    plan = make_plan(stage, lengths, image_row=job.model.num_image_tokens + 1)
    engine = initialise(model, stage, world_size=world_size, gpu=job.gpu)

    def batches(of: Samples, planned: Plan) -> Batches:
        return Batches(
            plan=planned,
            rows=Rows(
                of,
                Conversation.open(folder, stage.template),
                rules,
                kept_bytes=KEPT_BYTES // max(1, job.loader_processes),
            ),
            normalise=PixelMaker.open(folder),
            rank=dist.get_rank(),
            world_size=world_size,
            threads=job.threads,
            processes=job.loader_processes,
            pin=job.gpu,
        )

    held_out = None
    if job.held_out is not None:
        others = open_samples(Storage(job.root), job.held_out)
        held_out = batches(others, one_epoch(stage, len(others)))
    return Loop(
        engine=engine,
        batches=batches(samples, plan),
        held_out=held_out,
        held_out_every_steps=stage.held_out_every_steps,
        saves_best=stage.export_checkpoint == "best",
        schedule=Schedule(
            peak=stage.learning_rate,
            warmup_ratio=stage.warmup_ratio,
            total_steps=plan.total_steps,
        ),
        checkpoints=Checkpoints(home, engine, attempt=job.attempt),
        save_every_steps=stage.save_every_steps,
        step_deadline_s=job.step_deadline_s,
        budget=stage.budget,
        dtype=weights.to_dtype(stage.dtype),
        guard=Guard(spike_factor=stage.spike_factor, rollback_after=stage.rollback_after_skips),
        work=Work(model=job.model, trainable=stage.trainable, tflops=_tflops(engine.device)),
        monitor=monitor,
    )


def _tflops(device: torch.device) -> float | None:
    return tflops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _step_to_export(job: Job, loop: Loop, progress: Progress) -> int:
    """Return the step whose weights the model has now: the last, or the best, read from its
    checkpoint if it is another.
    """
    if job.stage.export_checkpoint == "last":
        back = progress.rollbacks[-1:]  # at the very end, with no right step since
        return back[0].to if back and back[0].at == progress.step else progress.step
    best = least(progress.held_out).step
    if best != progress.step:
        loop.checkpoints.restore_step(best)
    return best


def _export(job: Job, home: Storage, folder: Path, model: Any, engine: Any) -> dict[str, str]:
    """Write the model folder from rank 0; under ZeRO-3 all ranks give their parts."""
    sharded = job.stage.zero_stage == 3
    state = engine._zero3_consolidated_16bit_state_dict() if sharded else model.state_dict()
    if dist.get_rank() != 0:
        return {}
    dtype = weights.to_dtype(job.stage.export_dtype)
    for name in state:  # one after the other: what it replaces is freed, there is no second model
        state[name] = _alone(state[name].detach().to("cpu", dtype))
    weights.save(model, folder, dtype=job.stage.export_dtype, state=state)
    return home.upload(folder, MODEL_FOLDER)


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that owns its memory: DeepSpeed lays parameters into one buffer, and
    safetensors takes no views of another tensor.
    """
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class _RayMonitor:
    """Sends metrics to Ray Train and, from rank 0, to a tracker, Prometheus and the log."""

    def __init__(
        self, artifact: str, tracker: Tracker, inbox: Inbox, *, rank: int, show: bool
    ) -> None:
        self._rank, self._show, self._was_asked = rank, show, False
        self._tracker, self._inbox = tracker, inbox
        self._labels = {"artifact": artifact}
        self._gauges = {
            field: Gauge(metric.name, metric.description, metric.labels)
            for field, metric in (
                ("loss", observe.TRAIN_LOSS),
                ("step", observe.TRAIN_STEP),
                ("learning_rate", observe.TRAIN_LEARNING_RATE),
                ("grad_norm", observe.TRAIN_GRAD_NORM),
                ("held_out_loss", observe.TRAIN_HELD_OUT_LOSS),
                ("samples_per_s", observe.TRAIN_SAMPLES_PER_S),
                ("tokens_per_s", observe.TRAIN_TOKENS_PER_S),
                ("mfu", observe.TRAIN_MFU),
                ("padding_share", observe.TRAIN_PADDING_SHARE),
                ("data_wait_share", observe.TRAIN_DATA_WAIT_SHARE),
                ("memory_gb", observe.TRAIN_MEMORY_GB),
                ("eta_s", observe.TRAIN_ETA_S),
                ("rejected", observe.TRAIN_REJECTED),
                ("skipped", observe.TRAIN_SKIPPED),
                ("rollbacks", observe.TRAIN_ROLLBACKS),
            )
        }

    def report(self, metrics: Metrics) -> None:
        """Take the metrics of the last step."""
        ray.train.report(dataclasses.asdict(metrics))
        self._tracker.log(metrics)
        if self._rank != 0:
            return
        for field, gauge in self._gauges.items():
            if (value := getattr(metrics, field)) is not None:
                gauge.set(value, self._labels)
        if self._show:
            _log.info("%s: %s", self._labels["artifact"], describe(metrics))

    def should_save(self) -> bool:
        """Say, once, that Ray is about to lose a machine of this run."""
        if self._was_asked or ray.train.get_preemption_info() is None:
            return False
        self._was_asked = True
        return True

    def asked(self) -> Word:
        """Return what a signal to the driver asks."""
        return self._inbox.take()


def describe(metrics: Metrics) -> str:
    """Return one line on how a run is doing."""
    minutes, seconds = divmod(round(metrics.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    loss = metrics.held_out_loss
    held_out = "" if loss is None else f", held-out loss {loss:.4f}"
    mfu = "" if metrics.mfu is None else f", MFU {metrics.mfu:.2f}"
    return (
        f"step {metrics.step}/{metrics.total_steps} (epoch {metrics.epoch:.2f}), "
        f"loss {metrics.loss:.4f}, lr {metrics.learning_rate:.3g}, "
        f"grad norm {metrics.grad_norm:.3g}{held_out}, {metrics.samples_per_s:.1f} samples/s, "
        f"{metrics.tokens_per_s:.0f} tokens/s{mfu}, "
        f"{metrics.data_wait_share:.1%} waiting for data, "
        f"{metrics.padding_share:.1%} padding, {metrics.memory_gb:.1f} GB, "
        f"{metrics.rejected} rejected, {metrics.skipped} steps skipped, "
        f"{hours}:{minutes:02d}:{seconds:02d} left"
    )
