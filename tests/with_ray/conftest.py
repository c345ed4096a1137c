# SPDX-License-Identifier: Apache-2.0
"""What all tests of this folder share: a Ray cluster, which starts longer than most tests take."""

from collections.abc import Iterator

import pytest
import ray
import torch.distributed as dist


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A process group of this process alone; one for all, because DeepSpeed remembers the first."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    # With a dashboard: without, nothing frees the workers of a training driver that was killed.
    settings = {"idle_worker_killing_time_threshold_ms": 60_000, "metrics_report_interval_ms": 1000}
    ray.init(
        "local",
        num_cpus=4,
        num_gpus=4,
        include_dashboard=True,
        log_to_driver=False,
        _system_config=settings,
    )
    yield
    ray.shutdown()
