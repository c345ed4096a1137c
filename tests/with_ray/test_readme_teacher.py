# SPDX-License-Identifier: Apache-2.0
"""The README's teacher captions as they are written, in front of a local provider."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from tests.teacher.desk_site import KEY, picture
from tests.teacher_server.config import ServerConfig
from tests.teacher_server.running import serving
from tests.with_ray.collect_site import OUT

pytestmark = [pytest.mark.teacher, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
INDEX = "python -m jobs.index_images folder --step.0.config.sources.0.path /absolute/path/to/photos"
NUM_IMAGES = 24


def commands() -> list[str]:
    """Return the README's lines about teacher captions."""
    section = (REPOSITORY / "README.md").read_text().split("## Teacher captions")[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def exports() -> str:
    """Return the README's command that writes a teacher's captions as JSON."""
    found = re.search(r"`(export_captions folder [^`]*)`", (REPOSITORY / "README.md").read_text())
    assert found is not None
    return f"python -m jobs.{found[1]}"


def test_the_readmes_lines_estimate_collect_and_show(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(NUM_IMAGES):
        (photos / f"{number}.jpg").write_bytes(picture(number))

    config = ServerConfig(model="gpt-4o-2024-11-20")
    with serving(config, tmp_path / "provider.jsonl") as provider:

        def run(command: str) -> str:
            argv = [sys.executable, *shlex.split(command)[1:]]
            if "collect_captions" in command:
                argv.append(f"--endpoint.base-url={provider.url}")
            done = subprocess.run(
                argv,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OPENAI_API_KEY": KEY},
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        path = INDEX.replace("/absolute/path/to/photos", str(photos))
        run(f"{path} --where.root runs/photos")
        lines = commands()
        assert len(lines) == 3
        estimate, collected, reviewed = map(run, lines)
        assert len(provider.entries("request")) == NUM_IMAGES, "an estimate sends nothing"
        exported = run(f"{exports()} --where.root runs/photos")

    assert exported.startswith("4 records: "), "20 of 24 are held out"
    assert re.search(rf"folder +{NUM_IMAGES} ", estimate)
    assert re.search(r"all +", estimate)
    assert f"teacher-captions@v1: {NUM_IMAGES} rows, 0 rejected" in collected
    assert f"folder: images {NUM_IMAGES}" in reviewed
    storage = Storage(str(tmp_path / "runs" / "photos"))
    rows: list[CaptionRow] = read_rows(storage, OUT, CaptionRow)
    assert all(row.text for row in rows)
    assert json.loads(storage.get(f"{OUT.path}/lost.json")) == []
    assert json.loads(storage.get(f"{OUT.path}/status.json"))["usd_so_far"] > 0
    assert storage.get(f"{OUT.path}/review.html").count(b"<article") == 20
