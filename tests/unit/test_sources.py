# SPDX-License-Identifier: Apache-2.0
"""An index lists every image once, with what is needed to read it, and no pixels."""

import os
from collections import Counter
from pathlib import Path

import pytest

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError, ContractError, LeaseHeld
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import ImageRow, Question
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.where import Where
from sg4v_ray.sources.drawn_shapes import DrawnShapes
from sg4v_ray.sources.easy_vqa import EasyVqaImages, EasyVqaQuestions
from sg4v_ray.sources.folder import Folder
from sg4v_ray.sources.index import IndexConfig, QuestionsConfig, run, run_questions

IMAGES, QUESTIONS = Ref(name="images"), Ref(name="questions")


@pytest.fixture
def where(tmp_path: Path) -> Where:
    return Where(root=str(tmp_path / "root"))


def index(where: Where, *sources: Folder | EasyVqaImages | DrawnShapes) -> list[ImageRow]:
    run(IndexConfig(sources=sources), out=IMAGES, where=where)
    return read_rows(where.storage, IMAGES, ImageRow)


def test_a_folder_lists_all_image_files_even_those_we_do_not_decode(
    where: Where, tmp_path: Path
) -> None:
    for name in ("b.JPG", "sub/a.png", "sub/scan.tiff", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"12345")
    rows = index(where, Folder(path=str(tmp_path / "in")))
    assert [one.id for one in rows] == ["b.JPG", "sub/a.png", "sub/scan.tiff"]
    assert rows[1].uri == str(tmp_path / "in/sub/a.png")
    assert rows[1].size_bytes == 5


def test_equal_ids_of_two_sources_are_an_error_that_names_both(
    where: Where, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"1")
    sources = [Folder(path=str(tmp_path / name), name=name) for name in ("one", "two")]
    with pytest.raises(ContractError, match=r"one/a\.png and .*two/a\.png"):
        index(where, *sources)


@pytest.mark.parametrize("path", ["/does/not/exist", "/var/empty-or-missing"])
def test_a_missing_folder_is_refused(where: Where, path: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        index(where, Folder(path=path))


def test_files_that_are_not_named_like_images_are_left_out_with_a_word(
    where: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "a.txt", "b.json"):
        (folder / name).write_bytes(b"1")
    with caplog.at_level("INFO", logger="sg4v_ray"):
        rows = index(where, Folder(path=str(folder)))
    assert [one.id for one in rows] == ["a.png"]
    assert f"left out 2 files that are not named like images, e.g. {folder}/a.txt" in caplog.text


def test_a_wrong_first_attempt_binds_nobody(where: Where, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--step\.0\.config\.sources\.0\.path"):
        index(where, Folder(path="/does/not/exist"))
    (tmp_path / "a.png").write_bytes(b"1")
    assert [one.id for one in index(where, Folder(path=str(tmp_path)))] == ["a.png"]


def test_a_second_job_that_is_refused_leaves_the_config_of_the_first(
    where: Where, tmp_path: Path
) -> None:
    index(where, EasyVqaImages(split="test", name="test"))
    home = where.storage.sub(IMAGES.path)
    home.delete("manifest.json")  # as if the first job had not ended
    before = home.get("config.json")
    with hold(home), pytest.raises(LeaseHeld):
        index(where, Folder(path=str(tmp_path), name="mine"))
    assert home.get("config.json") == before


def test_a_file_name_that_cannot_be_an_id_is_named(where: Where, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"1")
    with pytest.raises(ConfigError, match=r"caf\\xe9\.png' is not UTF-8"):
        index(where, Folder(path=str(tmp_path)))


def test_an_empty_folder_is_refused(where: Where, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="'folder' has no rows"):
        index(where, Folder(path=str(tmp_path / "empty")))


def test_a_relative_folder_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=f"write {Path('photos').absolute()}"):
        Folder(path="photos")


def test_drawn_images_are_equal_for_equal_seeds(where: Where, tmp_path: Path) -> None:
    again = Where(root=str(tmp_path / "again"))
    source = DrawnShapes(num_images=20, seed=3)
    first, second = index(where, source), index(again, source)
    assert len(first) == 20
    pairs = zip(first, second, strict=True)
    assert all(Path(a.uri).read_bytes() == Path(b.uri).read_bytes() for a, b in pairs)
    assert len({Path(one.uri).read_bytes() for one in first}) == 20


def test_easy_vqa_is_whole_and_its_questions_find_their_images(where: Where) -> None:
    rows = index(where, EasyVqaImages(split="test", name="easy-vqa-test"))
    assert len(rows) == 1000
    config = QuestionsConfig(source=EasyVqaQuestions(split="test"))
    run_questions(config, images=IMAGES, out=QUESTIONS, where=where)
    questions: list[Question] = read_rows(where.storage, QUESTIONS, Question)
    assert len(questions) == 9673
    assert {one.image_id for one in questions} <= {one.id for one in rows}
    assert Counter(one.answers[0] for one in questions).total() == 9673


def test_questions_about_images_that_were_not_indexed_are_refused(where: Where) -> None:
    index(where, DrawnShapes(num_images=1, seed=1))
    config = QuestionsConfig(source=EasyVqaQuestions(split="test"))
    with pytest.raises(ContractError, match="index the test images too"):
        run_questions(config, images=IMAGES, out=QUESTIONS, where=where)
