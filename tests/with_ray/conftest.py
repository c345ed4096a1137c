# SPDX-License-Identifier: Apache-2.0
"""One Ray cluster for all tests of this folder: starting one takes longer than most tests."""

from collections.abc import Iterator

import pytest
import ray


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
