# SPDX-License-Identifier: Apache-2.0
"""The layers hold, and the checks that hold them would notice a breach."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
LIGHT = (
    "jobs.caption_images",
    "jobs.run_all",
    "sg4v_ray.exactly_once.generate",
    "sg4v_ray.exactly_once.pixels",
    "sg4v_ray.inference.fake",
    "sg4v_ray.inference.open",
    "sg4v_ray.recipes.catalogue",
)
"""What the captioning driver, its decode workers and a fake engine import."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources, to plant breaches in."""
    for name in ("sg4v_ray", "jobs", "serve"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


def heavy_imports(folder: Path) -> str:
    """Return which heavy packages the light modules load."""
    script = (
        f"import importlib, sys\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'deepspeed'} & set(sys.modules)))"
    )
    done = run(folder, sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def plant(folder: Path, module: str, line: str) -> None:
    file = folder / module
    file.write_text(file.read_text() + f"\n{line}\n")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        pytest.param(
            "sg4v_ray/core/images.py",
            "from sg4v_ray.model.geometry import as_model_sees  # noqa",
            id="upward",
        ),
        pytest.param(
            "sg4v_ray/captions/bulk.py",
            "from sg4v_ray.dataset.build import BuildConfig  # noqa",
            id="sideways",
        ),
    ],
)
def test_a_planted_layer_violation_is_caught(copy: Path, module: str, line: str) -> None:
    plant(copy, module, line)
    done = lint_imports(copy)
    assert done.returncode != 0
    assert module.replace("/", ".").removesuffix(".py") in done.stdout


def test_the_captioning_driver_does_not_import_torch() -> None:
    assert heavy_imports(REPO) == "[]"


def test_a_planted_torch_import_is_caught(copy: Path) -> None:
    plant(copy, "sg4v_ray/captions/bulk.py", "import torch  # noqa")
    assert "torch" in heavy_imports(copy)


def test_package_files_are_empty() -> None:
    inits = [*REPO.glob("sg4v_ray/**/__init__.py"), REPO / "jobs/__init__.py"]
    assert [str(one) for one in inits if one.read_text()] == []


def test_the_training_driver_imports_neither_deepspeed_nor_transformers() -> None:
    script = (
        "import sys, sg4v_ray.training.launch\n"
        "print(sorted({'transformers', 'vllm', 'deepspeed'} & set(sys.modules)))"
    )
    done = run(REPO, sys.executable, "-c", script)
    assert done.stdout.strip() == "[]", done.stderr
