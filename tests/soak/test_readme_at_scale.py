# SPDX-License-Identifier: Apache-2.0
"""The README's captioning at scale as it is written, on small archives of real images."""

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
NUM_SHARDS = 100  # as the README's line names them; a missing one is an error


def shards(folder: Path) -> None:
    """Write archives of one image each; the last one's is cut off."""
    paths = [Path(path) for _, path in sorted(easy_vqa.get_test_image_paths().items())]
    for shard, path in enumerate(paths[:NUM_SHARDS]):
        data = path.read_bytes()
        if shard == NUM_SHARDS - 1:
            data = data[: len(data) // 2]
        with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as archive:
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
    assert indexed.startswith(f"images@v1: {NUM_SHARDS} ")
    assert f"captions@v1: {NUM_SHARDS} rows, 1 rejected" in captioned
    assert f"captions@v1: {NUM_SHARDS} rows, 1 rejected" in retried
    captions = root / "captions" / "v1"
    assert str(captions / "report.html") in reported
    assert "truncated" in (captions / "report.html").read_text()
    assert exported.startswith(f"{NUM_SHARDS - 1} records: ")
    records = json.loads((captions / "llava.json").read_text())
    assert len(records) == NUM_SHARDS - 1
    assert json.loads((captions / "status.json").read_text())["state"] == "finished"
