# SPDX-License-Identifier: Apache-2.0
"""Batches for a GPU lie in pinned memory, by threads and by processes, and arrive as they are."""

from pathlib import Path

import pytest
import torch

from tests.unit.rows_site import make_batches, open_rows, write_samples

pytestmark = [pytest.mark.gpu, pytest.mark.training]
TENSORS = ("input_ids_BT", "attention_mask_BT", "labels_BT", "pixels_N3SS")


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_are_pinned_and_the_gpu_sees_what_was_made(
    tmp_path: Path, tiny_model: Path, processes: int
) -> None:
    rows = open_rows(write_samples(tmp_path), tiny_model)
    plain = list(make_batches(rows).steps(0))
    pinned = list(make_batches(rows, processes=processes, pin=True).steps(0))
    assert len(plain) == len(pinned)
    for (expected,), (made,) in zip(plain, pinned, strict=True):
        assert made.counts == expected.counts
        for name in TENSORS:
            tensor = getattr(made, name)
            assert tensor.is_pinned()
            there = tensor.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            assert torch.equal(there.cpu(), getattr(expected, name))
