# SPDX-License-Identifier: Apache-2.0
"""One Ray and one Serve for each file of this folder; each test deploys what it needs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.__main__ import LEAN
from tests.serving.site import Server, running

os.environ.update(LEAN)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("serving"), tiny_model) as found:
        yield found
