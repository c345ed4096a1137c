# SPDX-License-Identifier: Apache-2.0
"""The training state of one rank as named pieces, whatever way DeepSpeed has sharded it.

    model parameter, flattened   [.....start|==== numel ====|.........]
    float32 buffer of this rank  [offset|==== numel ====|.............]

Every piece says which part of which parameter it is, so a state that was written by some number
of workers under some ZeRO stage can be read by any other. (DeepSpeed's own checkpoints are pickles
of one world size, and need a conversion of the whole state to be read by another.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from sg4v_ray.core.errors import ContractError

KINDS: Final = ("weight", "exp_avg", "exp_avg_sq")
"""The float32 weights and AdamW's two moments."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a trained parameter that this rank holds."""

    name: str
    """Of the parameter in the model."""
    start: int
    """Of the part, in the flattened parameter."""
    numel: int
    size: int
    """Of the whole parameter."""
    flat: Tensor
    """The optimizer's float32 parameter that holds it: this rank's buffer of many pieces."""
    offset: int
    """Of the part, in `flat`."""

    def read(self, optimizer: torch.optim.Optimizer, kind: str) -> Tensor:
        """Return a view (numel,); zeros for moments before the first step."""
        if kind == "weight":
            whole = self.flat.detach()
        else:
            state = optimizer.state.get(self.flat, {})
            whole = state[kind] if kind in state else torch.zeros_like(self.flat)
        return whole.flatten().narrow(0, self.offset, self.numel)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed's engine wraps."""
    optimizer: Any = engine.optimizer
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def pieces(engine: Any) -> list[Piece]:
    """Return what this rank holds of the trained parameters; of the unsharded, rank 0 all.

    Raises:
        ContractError: DeepSpeed keeps its state where this version of it does not.
    """
    found: list[Piece] = []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found += _pieces_of(engine, name, parameter)
    total = torch.tensor([sum(one.numel for one in found)], device=engine.device)
    dist.all_reduce(total)
    trained = sum(_size(one) for one in engine.module.parameters() if one.requires_grad)
    copies = dist.get_world_size() if is_whole(engine) else 1
    if int(total) != trained * copies:
        raise ContractError(
            f"of {trained} trained numbers {int(total)} were found in DeepSpeed's buffers; install "
            "the locked version of DeepSpeed"
        )
    return found


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_whole(engine: Any) -> bool:
    """Say whether every rank holds the optimizer's whole state."""
    return engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled()


def _pieces_of(engine: Any, name: str, parameter: Any) -> Iterator[Piece]:
    optimizer = engine.optimizer
    size = _size(parameter)
    if is_whole(engine):
        yield Piece(name, 0, size, size, parameter, 0)
    elif engine.zero_optimization_stage() == 3:
        group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank() * part
        if (numel := min(part, size - start)) > 0:  # the last ranks' parts are padded
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Piece(name, start, numel, size, flat, offset)
    elif (mapping := parameter._hp_mapping) is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = _flats(optimizer)[mapping.param_group_index]
        yield Piece(name, here.start, here.numel, size, flat, there.start)


def _flats(optimizer: Any) -> list[Tensor]:
    """Return the float32 buffers of ZeRO 1 and 2, or of the bfloat16 optimizer without ZeRO."""
    for place in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if (found := getattr(optimizer, place, None)) is not None:
            flats: list[Tensor] = found
            return flats
    raise ContractError(
        f"{type(optimizer).__name__} has no float32 buffers; install the locked DeepSpeed"
    )


def restore(
    engine: Any, held: list[Piece], state: dict[tuple[str, str], Tensor], steps: int
) -> None:
    """Put a state into DeepSpeed and bring the model's weights in line. All ranks together.

    Args:
        held: what `pieces` returned.
        state: (numel,) float32 by kind and parameter name, for every piece.
        steps: updates that the optimizer has made.
    """
    optimizer = inner_optimizer(engine)
    _make_moments(optimizer, held, steps)
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
    for piece in held:
        for kind in KINDS:
            piece.read(optimizer, kind).copy_(state[kind, piece.name])
    if engine.zero_optimization_stage() == 3:
        _refresh_sharded(engine.optimizer)
        engine.optimizer.checkpoint_event_epilogue()
    elif not is_whole(engine):
        engine.optimizer.update_lp_params()


def _make_moments(optimizer: torch.optim.Optimizer, held: list[Piece], steps: int) -> None:
    """Give every buffer the state that AdamW makes at its first step."""
    for piece in held:
        state = optimizer.state[piece.flat]
        for kind in KINDS[1:]:
            if kind not in state:
                state[kind] = torch.zeros_like(piece.flat)
        # torch's fused AdamW counts on the device, the other one on the host.
        device = piece.flat.device if optimizer.param_groups[0].get("fused") else None
        state["step"] = torch.tensor(float(steps), device=device)


def _refresh_sharded(optimizer: Any) -> None:
    """Write ZeRO-3's float32 parts into the model's weights, as its own loading does."""
    for group, whole in enumerate(optimizer.fp32_partitioned_groups_flat):
        if not whole.numel():
            continue
        half = optimizer.fp16_partitioned_groups_flat[group]
        half.data.copy_(whole.data)
        parts = optimizer.fp16_partitioned_groups[group]
        for part, new in zip(parts, optimizer.unflatten(half, parts), strict=True):
            part.data = new.data
