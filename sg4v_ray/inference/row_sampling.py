# SPDX-License-Identifier: Apache-2.0
"""Sampling for HFEngine that gives each row its own temperature, top-p, penalty and seed.

transformers samples a whole batch with one setting and one generator, so a request's text would
depend on who shares its batch. Here each row adds Gumbel noise of its own to its logits and
`generate` takes the largest, which is the same as drawing from the softmax.
"""

# Shape letters used in this file:
#   B  rows of the batch        S  rows that sample        V  vocabulary        T  tokens so far

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from sg4v_ray.inference.engine import Generation


class RowSampler(LogitsProcessor):
    """Penalties for every row, noise for those that sample; greedy rows keep their order."""

    def __init__(self, rows: Sequence[Generation], *, mask_BT: Tensor) -> None:
        """`mask_BT` is False where a prompt is padded."""
        device = mask_BT.device
        self._padding_BT = ~mask_BT
        self._penalties_B1 = _column([one.repetition_penalty for one in rows]).to(device)
        self._sampled = [index for index, one in enumerate(rows) if one.temperature > 0]
        chosen = [rows[index] for index in self._sampled]
        self._temperatures_S1 = _column([one.temperature for one in chosen]).to(device)
        self._top_ps_S1 = _column([one.top_p for one in chosen]).to(device)
        # On the CPU wherever the model is, so that a seed means the same on every machine.
        self._generators = [torch.Generator().manual_seed(one.seed) for one in chosen]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take (B, T) ids and (B, V) logits; return logits whose largest is the next token.

        The logits may be changed in place: `generate` makes a copy for its processors.
        """
        scores_BV = self._penalise(input_ids, scores)
        if not self._sampled:
            return scores_BV
        logits_SV = _within_top_p(scores_BV[self._sampled] / self._temperatures_S1, self._top_ps_S1)
        width = logits_SV.shape[1]
        waits_SV = torch.stack(
            [torch.empty(width).exponential_(generator=one) for one in self._generators]
        )
        scores_BV[self._sampled] = logits_SV - waits_SV.log().to(logits_SV.device)
        return scores_BV

    def _penalise(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        if bool((self._penalties_B1 == 1).all()):
            return scores_BV
        # Padding must not count as text: put a token there that the row has anyway.
        prompt = self._padding_BT.shape[1]
        seen_BT = ids_BT.clone()
        seen_BT[:, :prompt] = torch.where(self._padding_BT, ids_BT[:, -1:], ids_BT[:, :prompt])
        old_BT = scores_BV.gather(1, seen_BT)
        new_BT = torch.where(old_BT < 0, old_BT * self._penalties_B1, old_BT / self._penalties_B1)
        return scores_BV.scatter(1, seen_BT, new_BT)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1)


def _within_top_p(logits_SV: Tensor, top_ps_S1: Tensor) -> Tensor:
    """Drop the least likely tokens that together have a probability below 1 - top_p."""
    ascending_SV, order_SV = logits_SV.sort(dim=1)
    below_SV = ascending_SV.softmax(dim=1).cumsum(dim=1) <= 1 - top_ps_S1
    below_SV[:, -1] = False
    return logits_SV.masked_fill(below_SV.scatter(1, order_SV, below_SV), -torch.inf)
