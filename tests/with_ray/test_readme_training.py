# SPDX-License-Identifier: Apache-2.0
"""The README's lines about training as they are written, and its table as the job prints it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs._cli import parse
from sg4v_ray.recipes.sharegpt4v import planned
from sg4v_ray.training.cluster import Cluster
from sg4v_ray.training.estimate import estimate
from tests.unit.weight_sources import write_clip, write_vicuna

pytestmark = pytest.mark.training

REPOSITORY = Path(__file__).parents[2]


def section() -> str:
    """Return the README's section about training."""
    text = (REPOSITORY / "README.md").read_text().split("## Training at scale")[1]
    return text.split("\n## ")[0]


def test_weights_go_in_and_out_by_the_readmes_lines(tmp_path: Path) -> None:
    write_vicuna(tmp_path / "vicuna")
    write_clip(tmp_path / "clip")
    block = re.search(r"```\n(.*?)```", section(), re.DOTALL)
    assert block is not None
    joined = block[1].replace("\\\n", " ")
    counted, brought_in, trained, taken_out = joined.strip().splitlines()
    # The README exports the model that was trained; here it is the one that was just imported.
    taken_out = taken_out.replace("vlm@v1", "vicuna-clip@v1")

    def run(command: str) -> str:
        line = command
        for place in ("/data", "/shared", "$PWD"):
            line = line.replace(place, str(tmp_path))
        argv = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(
            argv, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "16 x A100-80G (2 nodes of 8)" in run(counted)
    assert "vicuna-clip@v1" in run(brought_in)
    _, where = parse("", lambda line: line, shlex.split(trained)[3:])
    assert (where.train_workers, where.train_gpu, where.loader_processes) == (16, True, 4)
    assert where.worker_cpus > where.loader_processes and where.engine_gpus == 1
    assert "vicuna-clip@v1 as llava-hf" in run(taken_out)
    assert (tmp_path / "vlm/model.safetensors").is_file()


def test_the_readmes_table_is_what_the_job_estimates() -> None:
    plans = {one.stage.kind: one for one in planned("7b")}
    rows = re.findall(r"^\| (align|pretrain|finetune).*", section(), re.MULTILINE)
    assert rows == ["align", "pretrain", "finetune"]
    for line in section().splitlines():
        if not line.startswith(("| align", "| pretrain", "| finetune")):
            continue
        kind, *_ = line.removeprefix("| ").split(",")
        one = plans[kind]  # type: ignore[index]
        made = estimate(
            one.stage, one.model, data=one.data, cluster=Cluster(), mfu=one.published_mfu
        )
        _, what, memory, steps, hours, _ = (cell.strip() for cell in line.split("|"))
        assert f"ZeRO-{one.stage.zero_stage}, micro-batch {one.stage.micro_batch}" in what
        parts, total = memory.split(" = ")
        found = made.memory
        expected = (
            *(found.weights, found.gradients, found.optimizer, found.activations),
            *(found.buffers, found.total),
        )
        told = [float(part) for part in (*parts.split(" + "), total)]
        assert told == pytest.approx([part / 1e9 for part in expected], abs=0.051)
        assert int(steps.replace(",", "")) == made.steps
        assert float(hours.split()[0]) == pytest.approx(made.hours, abs=0.051)
