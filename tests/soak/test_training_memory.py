# SPDX-License-Identifier: Apache-2.0
"""A training process grows by what was estimated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs._bench_site import model_150m
from sg4v_ray.training.cluster import Cluster
from sg4v_ray.training.estimate import memory_of
from tests.soak.training_memory import stage

pytestmark = [pytest.mark.training, pytest.mark.soak]

REPOSITORY = Path(__file__).parents[2]
# glibc keeps freed tensors of up to 32 MB for later, in holes that the next ones may not fit: up to
# a gigabyte here. With a fixed threshold each tensor is a mapping of its own, and what is freed is
# gone, as it is in torch's allocator for GPUs: what stays resident is what is alive.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def test_a_process_grows_by_the_sum_of_the_parts_at_185m_parameters(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.training_memory", str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, **ALLOCATOR, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    memory = memory_of(stage(), model_150m(), Cluster(nodes=1, gpus_per_node=1))
    # A GPU holds DeepSpeed's buckets whole. A page of a CPU's is there once a gradient is written
    # into it, and then the activations that it came from are gone.
    estimated = memory.total - memory.buffers
    assert int(done.stdout.split()[-1]) == pytest.approx(estimated, rel=0.15)
