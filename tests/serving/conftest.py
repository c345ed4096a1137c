# SPDX-License-Identifier: Apache-2.0
"""One Ray and one Serve for each file of this folder; each test deploys what it needs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.lean import private_folder, settings
from tests.serving.site import Server, running

# For every Ray of these tests: ours, that of `python -m serve`, and the cluster of `serve deploy`.
_folder = private_folder()  # it goes when this process ends
os.environ.update(settings(Path(_folder.name), host="127.0.0.1", silent_s=60, longest_s=600))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("serving"), tiny_model) as found:
        yield found
