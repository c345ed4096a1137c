# SPDX-License-Identifier: Apache-2.0
"""Micro-batches made ahead of the step that takes them: in threads, or in processes of their own.

Threads cost no start and share what they read; but each line of Python that they run holds up the
thread that launches a GPU's kernels. Processes make the same micro-batches, to the bit.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol, Self, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from sg4v_ray.core import observe
from sg4v_ray.core.errors import Sg4vError


class LoaderFailed(Sg4vError):
    """A process that makes micro-batches is gone; Ray starts training from its last checkpoint."""


class _Batch(Protocol):
    def pin_memory(self) -> Self: ...


Row = TypeVar("Row")
Made = TypeVar("Made")
Batch = TypeVar("Batch", bound=_Batch)
Share = Sequence[tuple[int, ...]]
"""The sample numbers of each micro-batch of one worker in one step."""

_IMPORTED_ONCE: Final = ["sg4v_ray.training.batch", "sg4v_ray.model.pixels"]
"""What a loader process needs: 5 s to import, in the server and not in each of them."""


def by_threads(
    row: Callable[[int], Row],
    batch: Callable[[Sequence[Row]], Batch],
    shares: Iterator[Share],
    *,
    threads: int,
    pin: bool,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each share while those of the next are made.

    Args:
        row: makes a sample's row.
        batch: makes a micro-batch of rows.
        shares: of all steps to come.
        threads: that work ahead.
        pin: lay tensors into page-locked memory, which a GPU reads while it computes.
    """

    def batch_of(rows: Sequence[Future[Row]]) -> Batch:
        made = batch([one.result() for one in rows])
        return made.pin_memory() if pin else made

    with ThreadPoolExecutor(threads, "sg4v-rows") as pool:

        def begin(share: Share) -> list[Future[Batch]]:
            # Rows are queued before what waits for them, so that even one thread gets on.
            return [pool.submit(batch_of, [pool.submit(row, i) for i in one]) for one in share]

        coming = begin(next(shares, ()))
        while coming:
            now, coming = coming, begin(next(shares, ()))
            yield [one.result() for one in now]


def by_processes(
    row: Callable[[int], Row],
    batch: Callable[[Sequence[Row]], Batch],
    shares: Iterator[Share],
    *,
    processes: int,
    pin: bool,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each share; every process is up to two shares ahead.

    The processes end with this iterator, and with the process that it is in. Arguments are those
    of `by_threads`; `row` and `batch` are sent to the processes.

    Raises:
        Sg4vError: what `row` or `batch` raised on purpose, as itself.
        LoaderFailed: a process is gone, or failed in another way.
    """
    # Never forked from here: Ray, gloo and CUDA have threads in this process, and their locks
    # would be copied as they stand. The server has no such threads.
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED_ONCE)
    loader = DataLoader(
        _Steps(row, batch),
        batch_size=None,
        sampler=cast("Iterator[int]", shares),  # torch hands on whatever a sampler yields
        num_workers=processes,
        multiprocessing_context="forkserver",
        worker_init_fn=_set_up,
        generator=torch.Generator(),  # else a seed is drawn from the numbers of training
        pin_memory=pin,
    )
    for made in _received(loader):
        if isinstance(made, Sg4vError):
            raise made
        yield cast("list[Batch]", made)


def _received(loader: DataLoader[Made]) -> Iterator[Made]:
    """Yield what the processes made.

    Torch sees that one is gone when it waits for it. Where one is killed after it has sent a
    message, the memory that this names cannot be had from it, which is an error of its socket.
    """
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        raise LoaderFailed(
            f"a process that makes micro-batches failed: {error!r}. Training goes on from the "
            "last checkpoint. If this comes again: a process is killed where memory or /dev/shm "
            "is short; lower --where.loader-processes, or 0 for none"
        ) from error


class _Steps(Dataset[object]):
    """Shares to micro-batches, or to the error: torch makes its traceback its message."""

    def __init__(self, row: Callable[[int], Row], batch: Callable[[Sequence[Row]], Batch]) -> None:
        self._row, self._batch = row, batch

    def __getitem__(self, share: Share) -> object:
        try:
            return [self._batch([self._row(i) for i in one]) for one in share]
        except Sg4vError as error:
            return error


def _set_up(process: int) -> None:
    observe.set_up_logging()
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End this process when the one that takes its micro-batches is killed.

    Torch looks at the parent, which is the server; and the server lives while its children do.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
