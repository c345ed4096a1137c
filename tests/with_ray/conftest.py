# SPDX-License-Identifier: Apache-2.0
"""One Ray cluster for all tests of this folder: starting one takes longer than most tests."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    # With a dashboard: without, nothing frees the workers of a training driver that was killed.
    ray.init("local", num_cpus=4, num_gpus=4, include_dashboard=True, log_to_driver=False)
    yield
    ray.shutdown()
