# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other besides tensors. All of them call these together."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def gather(mine: T) -> list[T]:
    """Return what each rank gives, in their order, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, mine)
    return box


def from_first(make: Callable[[], T]) -> T:
    """Call a function on rank 0 only and return its result on every rank."""
    box: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])
