# SPDX-License-Identifier: Apache-2.0
"""The README's first jobs as a user types them, on the captioner that comes with the package."""

import subprocess
import sys
from pathlib import Path

import easy_vqa
import pytest
from PIL import Image

from sg4v_ray.analysis.easy_vqa import agreement, official
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.records import CaptionRow, Question
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources.easy_vqa import EasyVqaQuestions

pytestmark = pytest.mark.soak

REPO = Path(__file__).parents[2]
NUM_IMAGES = 64
CAPTIONS = Ref(name="captions")


def job(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *argv]
    return subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test images of easy-VQA and one file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    paths = easy_vqa.get_test_image_paths()
    for number in sorted(paths)[:NUM_IMAGES]:
        Image.open(paths[number]).save(folder / f"{number:05d}.png")
    (folder / "notes.png").write_text("milk, bread")
    return folder


def test_a_folder_is_captioned_well_and_says_what_is_no_image(photos: Path, tmp_path: Path) -> None:
    root = ["--where.root", str(tmp_path / "runs")]
    path = ["--step.0.config.sources.0.path", str(photos)]
    indexed = job("jobs.index_images", "folder", *path, *root)
    assert indexed.returncode == 0, indexed.stderr
    budget = ["--config.budget.max-reject-rate", "0.05"]
    first = job("jobs.caption_images", "folder", *budget, *root)
    assert first.returncode == 0, first.stderr
    assert f"captions@v1: {NUM_IMAGES + 1} rows, 1 rejected" in first.stdout
    verified = job("jobs.verify", "captions@v1", "--root", str(tmp_path / "runs"))
    assert f"verified captions@v1: {NUM_IMAGES + 1} ids, each exactly once" in verified.stdout

    storage = Storage(str(tmp_path / "runs"))
    rows = read_rows(storage, CAPTIONS, CaptionRow)
    assert [one.reject for one in rows if one.text is None] == ["not_an_image"]
    texts = {f"test-{Path(one.uri).stem}": one.text for one in rows}
    known = official(_questions(texts))
    found = agreement(texts, known)
    assert found.right_shape_of > NUM_IMAGES // 2
    assert found.right_shape >= 0.9
    assert found.right_colour >= 0.9


def _questions(wanted: dict[str, str | None]) -> list[Question]:
    paths = easy_vqa.get_test_image_paths()
    uris = {f"test-{number:05d}": path for number, path in paths.items()}
    return [one for one in EasyVqaQuestions(split="test").rows(uris) if one.image_id in wanted]
