# SPDX-License-Identifier: Apache-2.0
"""The training loop: one optimizer step for each global batch of the plan.

The loss of a step is the sum over its labelled tokens divided by their number, both over the
GLOBAL batch: neither the number of workers nor accumulation changes what is learnt. (The published
code takes a mean of means, which weighs the tokens of short answers more.)
"""

import dataclasses
import faulthandler
import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from sg4v_ray.core.errors import Stopped, TooManyRejects
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.model.conversation import IGNORE
from sg4v_ray.training.batch import Batches, MicroBatch
from sg4v_ray.training.checkpoint import Checkpoints, CheckpointsDamaged
from sg4v_ray.training.guard import Guard, TrainingDiverged, go_back
from sg4v_ray.training.metrics import Metrics, Monitor, Pace, Work
from sg4v_ray.training.progress import HeldOut, Progress
from sg4v_ray.training.ranks import gather
from sg4v_ray.training.schedule import SCALE, Schedule
from sg4v_ray.training.signals import Word

# Shape letters used in this file:
#   B  rows of a micro-batch    T  tokens of its longest row    V  vocabulary

_log = logging.getLogger(__name__)
_COUNTED = ("labels", "tokens", "padding", "samples", "images", "rejected", "cut")


LASTING: Final = (TrainingDiverged, TooManyRejects, CheckpointsDamaged, Stopped)
"""Errors that all ranks meet at the same step, and that no restart mends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """Everything that one run of the loop needs, on one rank."""

    engine: Any
    """DeepSpeed's."""
    batches: Batches
    schedule: Schedule
    held_out: Batches | None
    """Samples that are not trained on."""
    held_out_every_steps: int | None
    saves_best: bool
    """Save at each look whose loss is the least so far."""
    checkpoints: Checkpoints
    save_every_steps: int
    step_deadline_s: float
    """A step that takes longer ends this process, with the stacks of all its threads."""
    budget: RejectBudget
    dtype: torch.dtype
    """Of the model's weights, which images must have too."""
    guard: Guard
    work: Work
    monitor: Monitor


def train(loop: Loop) -> Progress:
    """Train from the last checkpoint to the end of the plan. All ranks call this together.

    Raises:
        TrainingDiverged: steps go on going wrong; the message names them.
        TooManyRejects: more samples are unusable than the budget allows.
    """
    try:
        progress = _train(loop)
    except LASTING:  # every rank has come to this at the same step
        loop.checkpoints.finish()
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    loop.checkpoints.finish()
    return progress


def _train(loop: Loop) -> Progress:
    plan, reasons = loop.batches.plan, Counter[str]()
    progress = loop.checkpoints.resume()
    pace = Pace(progress.step, workers=dist.get_world_size(), work=loop.work)
    for micro_batches in pace.waiting_for(loop.batches.steps(progress.step)):
        _set_deadline(loop)
        counts, is_time, is_written, word = _agree(loop, micro_batches, is_time=pace.is_time())
        if is_written:
            loop.checkpoints.finish()
        if word is not Word.NOTHING:
            progress = _obey(loop, word, progress, reasons)
        reasons.update(_reasons(micro_batches))
        made = _step(loop, micro_batches, progress, labels=counts["labels"])
        if not made.is_applied and dist.get_rank() == 0:
            _log.warning("step %d is not applied: %s", progress.step, made)
        pace.add(counts)
        progress = _after(progress, made, counts, wait_s=pace.last_wait_s, step_s=pace.lap())
        rejected = Counter(unreadable_image=progress.counts.get("rejected", 0))
        loop.budget.check(rejected=rejected, total=plan.num_planned)
        is_last = progress.step == plan.total_steps
        if loop.guard.must_go_back(progress):
            progress = go_back(loop.checkpoints, progress, loop.guard)
        # After a wrong step the weights may be what is wrong: they take no place of earlier ones,
        # and are no candidate for the best.
        is_sound = made.is_applied or is_last
        look_now = is_sound and _is_due(progress.step, loop.held_out_every_steps, is_last=is_last)
        if look_now:
            looked = HeldOut(step=progress.step, loss=_held_out_loss(loop))
            progress = dataclasses.replace(progress, held_out=(*progress.held_out, looked))
        must_save = is_sound and _is_due(progress.step, loop.save_every_steps, is_last=is_last)
        if loop.saves_best and look_now:
            must_save |= least(progress.held_out).step == progress.step
        must_hurry = False
        if is_time or is_last:
            loop.monitor.report(_metrics(loop, pace, progress))
            must_hurry = loop.monitor.should_save()
        if must_save or must_hurry:
            progress = _with_reasons(progress, reasons)
            reasons.clear()
            loop.checkpoints.begin(progress)
        if must_hurry:
            loop.checkpoints.finish()
    return progress


def _after(
    progress: Progress, made: "_Step", counts: Counter[str], *, wait_s: float, step_s: float
) -> Progress:
    return dataclasses.replace(
        progress,
        step=progress.step + 1,
        updates=progress.updates + made.is_applied,
        skipped=progress.skipped if made.is_applied else (*progress.skipped, progress.step),
        counts=dict(Counter(progress.counts) + counts),
        losses=(*progress.losses, made.loss),
        grad_norms=(*progress.grad_norms, made.grad_norm),
        seconds=(*progress.seconds, step_s),
        waits_s=(*progress.waits_s, wait_s),
    )


def _metrics(loop: Loop, pace: Pace, progress: Progress) -> Metrics:
    rate = loop.schedule.rate(progress.step - 1)
    return pace.metrics(progress, loop.batches.plan, learning_rate=rate, device=loop.engine.device)


def _agree(
    loop: Loop, micro_batches: list[MicroBatch], *, is_time: bool
) -> tuple[Counter[str], bool, bool, Word]:
    """Add up the counts of a step over all ranks.

    Returns:
        The counts, whether rank 0 says that it is time, whether all have written a checkpoint, and
        what the driver asks.
    """
    local = sum((one.counts for one in micro_batches), Counter[str]())
    is_first = dist.get_rank() == 0
    says = [int(is_time and is_first), int(loop.monitor.asked() if is_first else Word.NOTHING)]
    mine = [*(local[name] for name in _COUNTED), *says, int(loop.checkpoints.is_written)]
    summed = torch.tensor(mine, dtype=torch.int64, device=loop.engine.device)
    dist.all_reduce(summed)
    *counts, time_is_up, word, written = summed.tolist()
    is_written = written == dist.get_world_size()
    added = Counter(dict(zip(_COUNTED, counts, strict=True)))
    return added, bool(time_is_up), is_written, Word(word)


def _obey(loop: Loop, word: Word, progress: Progress, reasons: Counter[str]) -> Progress:
    """Save before a step; stop if that is asked, without saving again what is saved."""
    if word is Word.SAVE or progress.step != loop.checkpoints.last_step:
        progress = _with_reasons(progress, reasons)
        reasons.clear()
        loop.checkpoints.begin(progress)
    loop.checkpoints.finish()
    if word is Word.STOP:
        raise Stopped(
            f"stopped after step {progress.step} of {loop.batches.plan.total_steps}, saved; run "
            "the same command to go on"
        )
    return progress


@dataclass(frozen=True, slots=True)
class _Step:
    loss: float
    grad_norm: float
    is_applied: bool


def _step(loop: Loop, micro_batches: list[MicroBatch], progress: Progress, *, labels: int) -> _Step:
    """Make one optimizer step, applied only if it is right."""
    engine, step = loop.engine, progress.step
    # Nothing in the models draws numbers today. If something does, a resumed run draws the same.
    torch.manual_seed(hash((loop.batches.plan.seed, step, dist.get_rank())))
    for group in engine.optimizer.param_groups:
        group["lr"] = loop.schedule.rate(step) * group[SCALE]
    # DeepSpeed divides by the number of ranks; it would divide by the accumulation steps too.
    scale = dist.get_world_size() / max(1, labels)
    total = torch.zeros((), device=engine.device)
    for number, batch in enumerate(micro_batches, start=1):
        # Said, not counted by DeepSpeed: a step may have more or fewer than the one before.
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        loss_sum = _loss_sum(loop, batch)
        total += loss_sum.detach()
        if number == len(micro_batches):
            dist.all_reduce(total)
            loss = float(total) / max(1, labels)
            if loop.guard.is_wrong(progress, loss):
                loss_sum = loss_sum * math.nan  # DeepSpeed throws a step with such a gradient away
        engine.backward(loss_sum * scale, scale_wrt_gas=False)
        if number == len(micro_batches):
            norm = _unsharded_norm(engine)
            if norm is not None and not math.isfinite(norm):  # this one DeepSpeed would apply
                engine.module.zero_grad(set_to_none=True)
                return _Step(loss, norm, is_applied=False)
        engine.step()
    grad_norm = norm if norm is not None else float(engine.get_global_grad_norm())
    return _Step(loss, grad_norm, is_applied=bool(engine.was_step_applied()))


def least(looks: tuple[HeldOut, ...]) -> HeldOut:
    """Return the look with the least loss, the last one of equals; NaN is more than any."""
    return min(looks, key=lambda one: (not math.isfinite(one.loss), one.loss, -one.step))


def _is_due(step: int, every: int | None, *, is_last: bool) -> bool:
    return every is not None and (is_last or step % every == 0)


def _held_out_loss(loop: Loop) -> float:
    """Return the mean loss of the labelled tokens of the samples that are not trained on.

    Raises:
        TooManyRejects: more of them are unusable than the budget allows.
    """
    assert loop.held_out is not None  # checked before a worker starts
    sums = torch.zeros(4, dtype=torch.float64, device=loop.engine.device)
    loop.engine.eval()
    with torch.no_grad():
        for micro_batches in loop.held_out.steps(0):
            _set_deadline(loop)
            for batch in micro_batches:
                sums[0] += _loss_sum(loop, batch)
                for place, name in enumerate(("labels", "rejected", "samples"), start=1):
                    sums[place] += batch.counts[name]
    _set_deadline(loop)
    loop.engine.train()
    dist.all_reduce(sums)
    loss, labels, rejected, samples = sums.tolist()
    loop.budget.check(rejected=Counter(unreadable_image=int(rejected)), total=int(samples))
    return loss / labels if labels else math.nan


def _set_deadline(loop: Loop) -> None:
    """Let this process say where it stands, and end, if it is not done in time."""
    faulthandler.dump_traceback_later(loop.step_deadline_s, exit=True)


def _loss_sum(loop: Loop, batch: MicroBatch) -> Tensor:
    device = loop.engine.device
    logits_BTV = loop.engine(
        input_ids=batch.input_ids_BT.to(device, non_blocking=True),
        attention_mask=batch.attention_mask_BT.to(device, non_blocking=True),
        # In two calls: in one the CPU converts, into memory that is not pinned.
        pixel_values=batch.pixels_N3SS.to(device, non_blocking=True).to(loop.dtype),
        use_cache=False,
    ).logits
    targets_BT = batch.labels_BT.to(device, non_blocking=True)[:, 1:]
    return functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        targets_BT.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )


def _unsharded_norm(engine: Any) -> float | None:
    """Return the gradient norm where DeepSpeed keeps none: without ZeRO, in float32."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    found = [one.grad for one in engine.module.parameters() if one.grad is not None]
    return float(torch.nn.utils.get_total_norm(found))


def _reasons(micro_batches: list[MicroBatch]) -> Counter[str]:
    local = sum((one.counts for one in micro_batches), Counter[str]())
    return Counter({name: local[name] for name in local if name not in _COUNTED})


def _with_reasons(progress: Progress, reasons: Counter[str]) -> Progress:
    """Add what every rank rejected since the last checkpoint, by reason."""
    counts = sum((Counter(one) for one in gather(dict(reasons))), Counter(progress.counts))
    return dataclasses.replace(progress, counts=dict(counts))
