# SPDX-License-Identifier: Apache-2.0
"""From sample numbers to tensors: dataset@v -> rows -> micro-batches, made ahead (`loader`).

A sample that cannot be used (a broken image, nothing left of it to learn) keeps its place as a row
that weighs nothing; it is counted by reason. Every micro-batch holds at least one image: under
ZeRO-3 all ranks must run the same modules, or they wait for each other for ever.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sg4v_ray.core.images import ImageLimits, Rejected
from sg4v_ray.core.records import Sample
from sg4v_ray.exactly_once.pixels import load_image
from sg4v_ray.inference.engine import Pixels
from sg4v_ray.model.conversation import IGNORE, Conversation
from sg4v_ray.model.geometry import Geometry, as_model_sees
from sg4v_ray.training.loader import by_processes, by_threads
from sg4v_ray.training.plan import FILLER, Plan
from sg4v_ray.training.samples import Samples

_log = logging.getLogger(__name__)

# Shape letters used in this file:
#   B  rows of a micro-batch      T  tokens of the longest row, image tokens included
#   N  images of a micro-batch    S  side of an image in pixels

Normalise = Callable[[Sequence[Pixels]], Tensor]
"""Squares to (N, 3, S, S): `model.pixels.PixelMaker`."""

NO_LABELS = "no_labels"
"""Why a sample is not used when its answers lie beyond `max_length`."""

KEPT_BYTES = 256 * 2**20
"""Squares and tokens of a worker are kept up to this size and then no more: easy-VQA (5,000 images
of 64 pixels) fits and is decoded once, ShareGPT4V does not and does not fill the memory."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a micro-batch before padding."""

    token_ids: npt.NDArray[np.int32]
    """An image's placeholder is repeated once for each of its features."""
    labels: npt.NDArray[np.int32]
    pixels: Pixels | None
    is_sample: bool = True
    """False for a filler."""
    is_cut: bool = False
    """The end of its answer lies beyond `max_length`."""
    reject: str | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass takes."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_BT: Tensor
    pixels_N3SS: Tensor
    counts: Counter[str]
    """`labels`, `tokens`, `padding`, `samples`, `images`, `rejected`, `cut`, and
    `rejected_<reason>`."""

    def pin_memory(self) -> "MicroBatch":
        """Return the same in page-locked memory; torch's loader calls this by its name."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.pin_memory(),
            attention_mask_BT=self.attention_mask_BT.pin_memory(),
            labels_BT=self.labels_BT.pin_memory(),
            pixels_N3SS=self.pixels_N3SS.pin_memory(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRules:
    """How a sample becomes a row."""

    geometry: Geometry
    image_size: int
    num_image_tokens: int
    max_length: int
    image_limits: ImageLimits


class Rows:
    """Makes the row of a sample number; safe to call from several threads.

    Sent to another process it arrives with nothing kept and nothing counted.
    """

    def __init__(
        self,
        samples: Samples,
        conversation: Conversation,
        rules: RowRules,
        *,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.pad_token_id = conversation.pad_token_id
        self._samples, self._conversation, self._rules = samples, conversation, rules
        self._kept_bytes = self._free_bytes = kept_bytes
        self._kept: dict[int, Row] = {}
        self._num_rejected = 0
        self._lock = threading.Lock()
        self.filler = self._filler()

    def __reduce__(self) -> tuple[Callable[..., "Rows"], tuple[object, ...]]:
        again = partial(Rows, kept_bytes=self._kept_bytes)
        return again, (self._samples, self._conversation, self._rules)

    def __call__(self, index: int) -> Row:
        """Return the row of a sample, or of `FILLER`."""
        if index == FILLER:
            return self.filler
        if (kept := self._kept.get(index)) is not None:
            return kept
        row = self._make(self._samples[index])
        if row.reject is not None:
            return row  # the file may be there the next time
        pixels = 0 if row.pixels is None else row.pixels.nbytes
        with self._lock:
            self._free_bytes -= pixels + row.token_ids.nbytes + row.labels.nbytes
            if self._free_bytes > 0:
                self._kept[index] = row
        return row

    def _make(self, sample: Sample) -> Row:
        pixels = self._pixels(sample.uri) if sample.uri is not None else None
        if isinstance(pixels, Rejected):
            return self._rejected(sample, pixels.reason.value, pixels.detail)
        encoded = self._conversation.sample(sample.turns, num_images=int(pixels is not None))
        token_ids, labels = self._expand(encoded.token_ids, encoded.labels)
        limit = self._rules.max_length
        is_cut = bool(np.any(labels[limit:] != IGNORE))
        token_ids, labels = token_ids[:limit], labels[:limit]
        if not np.any(labels[1:] != IGNORE):
            return self._rejected(sample, NO_LABELS, f"no answer within {limit} tokens")
        return Row(token_ids, labels, pixels, is_cut=is_cut)

    def _pixels(self, uri: str) -> Pixels | Rejected:
        image = load_image(uri, limits=self._rules.image_limits)
        if isinstance(image, Rejected):
            return image
        return as_model_sees(image, self._rules.image_size, self._rules.geometry)

    def _expand(
        self, token_ids: Sequence[int], labels: Sequence[int]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        ids = np.asarray(token_ids, np.int32)
        is_image = ids == self._conversation.image_token_id
        repeats = np.where(is_image, self._rules.num_image_tokens, 1)
        return np.repeat(ids, repeats), np.repeat(np.asarray(labels, np.int32), repeats)

    def _rejected(self, sample: Sample, reason: str, detail: str) -> Row:
        with self._lock:
            self._num_rejected += 1
            count = self._num_rejected
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th...: a broken disk fills no log
            _log.warning(
                "sample %s (%s) is not used: %s, %s; %d so far in this process",
                sample.id,
                sample.uri,
                reason,
                detail,
                count,
            )
        filler = self.filler
        return Row(filler.token_ids, filler.labels, filler.pixels, reject=reason)

    def _filler(self) -> Row:
        ids = (self._conversation.bos_token_id, self._conversation.image_token_id)
        token_ids, labels = self._expand(ids, (IGNORE, IGNORE))
        side = self._rules.image_size
        return Row(token_ids, labels, np.zeros((side, side, 3), np.uint8), is_sample=False)


def collate(rows: Sequence[Row], normalise: Normalise, *, filler: Row, pad: int) -> MicroBatch:
    """Pad rows on the right and stack them; without any image, the filler joins as a last row."""
    images = [row.pixels for row in rows if row.pixels is not None]
    if not images and filler.pixels is not None:
        rows, images = [*rows, filler], [filler.pixels]
    shape = (len(rows), max(len(row.token_ids) for row in rows))
    ids = np.full(shape, pad, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    mask = np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        size = len(row.token_ids)
        ids[i, :size], labels[i, :size], mask[i, :size] = row.token_ids, row.labels, 1
    counts = Counter(
        labels=int((labels[:, 1:] != IGNORE).sum()),  # the first token has nothing before it
        tokens=int(mask.sum()),
        padding=int(mask.size - mask.sum()),
        samples=sum(row.is_sample for row in rows),
        images=sum(row.is_sample and row.pixels is not None for row in rows),
        cut=sum(row.is_cut for row in rows),
        rejected=sum(row.reject is not None for row in rows),
    )
    counts.update(f"rejected_{row.reject}" for row in rows if row.reject is not None)
    return MicroBatch(
        input_ids_BT=torch.from_numpy(ids),
        attention_mask_BT=torch.from_numpy(mask),
        labels_BT=torch.from_numpy(labels),
        pixels_N3SS=normalise(images),
        counts=counts,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """The share of one worker in every step of a plan."""

    plan: Plan
    rows: Rows
    normalise: Normalise
    rank: int
    world_size: int
    threads: int
    """Threads that make the next step while this one computes, where there are no processes."""
    processes: int = 0
    """Processes that make the next steps."""
    pin: bool = False
    """Lay tensors where a GPU can read them while it computes."""

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of each step from `first` to the end of the plan.

        Raises:
            LoaderFailed: one of the processes is gone.
        """
        shares = (
            self.plan.share(step, rank=self.rank, world_size=self.world_size)
            for step in range(first, self.plan.total_steps)
        )
        batch = partial(_batch, self.rows, self.normalise)
        if not self.processes:
            return by_threads(self.rows, batch, shares, threads=self.threads, pin=self.pin)
        return by_processes(self.rows, batch, shares, processes=self.processes, pin=self.pin)


def _batch(rows: Rows, normalise: Normalise, made: Sequence[Row]) -> MicroBatch:
    return collate(made, normalise, filler=rows.filler, pad=rows.pad_token_id)
