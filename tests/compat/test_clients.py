# SPDX-License-Identifier: Apache-2.0
"""Public clients of OpenAI's API work with the server unchanged; `make compat` installs them."""

import os
import shutil
import subprocess
from pathlib import Path

import easy_vqa
import pytest

from tests.compat.conftest import MODEL, REPOSITORY, Row, Server

pytestmark = pytest.mark.compat

HERE = Path(__file__).parent
PYTHON = REPOSITORY / ".venv-compat/bin/python"
PROGRAMS = (
    *("client_openai.py", "client_litellm.py", "client_langchain.py", "client_llm.py"),
    *("client_llm_comply.py", "client_openai.mjs", "client_ai_sdk.mjs"),
)
WORD = "triangle"
"""What the first test image of easy-VQA shows."""


def environment(server: Server, home: Path) -> dict[str, str]:
    """Return the clients' own variables, and nothing of whoever runs this."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_BASE": f"{server.url}/v1",
        "OPENAI_API_KEY": server.key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it downloads a list of prices
    }


def command(program: str) -> list[str | Path]:
    """Return how a client is run."""
    node = shutil.which("node")
    assert PYTHON.exists() and node, "the clients are not installed; run `make compat`"
    interpreter = PYTHON if program.endswith(".py") else node
    return [interpreter, HERE / program, MODEL, easy_vqa.get_test_image_paths()[0], WORD]


def lines(output: str, start: str) -> list[str]:
    return [one.removeprefix(start) for one in output.splitlines() if one.startswith(start)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_works(program: str, server: Server, rows: list[Row], tmp_path: Path) -> None:
    ran = subprocess.run(
        command(program),
        env=environment(server, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    client, works = lines(ran.stdout, "client: "), lines(ran.stdout, "works: ")
    passed = ran.returncode == 0
    rows.append(Row(program, client[0] if client else program, works, passed))
    assert passed, ran.stdout
    assert works, f"{program} tried nothing"
