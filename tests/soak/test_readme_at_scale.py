# SPDX-License-Identifier: Apache-2.0
"""The README's captioning at scale as it is written, on two small archives of real images."""

import io
import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import easy_vqa
import pytest

pytestmark = pytest.mark.scale

REPOSITORY = Path(__file__).parents[2]
NUM_IMAGES = 100


def shards(folder: Path) -> None:
    """Write two archives; one image in the second is cut off."""
    paths = [Path(path) for _, path in sorted(easy_vqa.get_test_image_paths().items())]
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as archive:
            for path in paths[shard * NUM_IMAGES // 2 : (shard + 1) * NUM_IMAGES // 2]:
                data = path.read_bytes()
                if path == paths[NUM_IMAGES - 1]:
                    data = data[: len(data) // 2]
                member = tarfile.TarInfo(f"{path.stem}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def commands(data: Path, root: Path) -> list[list[str]]:
    """Return the README's lines with the paths of this test."""
    readme = (REPOSITORY / "README.md").read_text()
    block = readme.split("## Captioning at scale")[1].split("```")[1]
    lines = block.strip().replace("$PWD/runs/big", str(root)).replace("/data/", f"{data}/")
    return [shlex.split(line) for line in lines.splitlines()]


def test_every_line_of_the_readme_does_what_it_says(tmp_path: Path) -> None:
    shards(tmp_path)
    root = tmp_path / "runs"
    said = []
    for command in commands(tmp_path, root):
        assert command[0] == "python"
        done = subprocess.run(
            [sys.executable, *command[1:]],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        said.append(done.stdout.strip())
    indexed, captioned, retried, reported, exported = said
    assert indexed.startswith(f"images@v1: {NUM_IMAGES} ")
    assert f"captions@v1: {NUM_IMAGES} rows, 1 rejected" in captioned
    assert f"captions@v1: {NUM_IMAGES} rows, 1 rejected" in retried
    captions = root / "captions" / "v1"
    assert str(captions / "report.html") in reported
    assert "truncated" in (captions / "report.html").read_text()
    assert exported.startswith(f"{NUM_IMAGES - 1} records: ")
    records = json.loads((captions / "llava.json").read_text())
    assert len(records) == NUM_IMAGES - 1
    assert json.loads((captions / "status.json").read_text())["state"] == "finished"
