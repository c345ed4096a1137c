# SPDX-License-Identifier: Apache-2.0
"""The processes that all crash points of a module share; they start longer than a point takes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crashes.workbench import Workbench, workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Workbench]:
    """A Ray cluster, a template of drivers, an S3 behind a proxy, and the shim of local roots."""
    with workbench(tmp_path_factory.mktemp("crashes"), tiny_model) as made:
        yield made
