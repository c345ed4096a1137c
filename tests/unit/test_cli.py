# SPDX-License-Identifier: Apache-2.0
"""The command line is made from recipes, and refuses what cannot work before any work."""

import errno
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from obstore.exceptions import GenericError

from jobs import _cli, _steps, build_dataset
from jobs.__main__ import listing
from jobs.run_all import plan
from sg4v_ray.core.errors import ArtifactMissing, ConfigError
from sg4v_ray.core.where import Where
from sg4v_ray.recipes import embedded, paper
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.sources.easy_vqa import EasyVqaImages
from sg4v_ray.sources.index import IndexConfig

VERBS = (
    "align",
    "build_dataset",
    "caption_images",
    "collect_captions",
    "retry_teacher",
    "review_captions",
    "demo",
    "evaluate",
    "finetune",
    "index_images",
    "index_questions",
    "pretrain",
    "run_all",
    "train_captioner",
)


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--flow.rows-per-block=9", r"--flow.rows-per-block is now --batching.rows-per-part"),
        ("--caption.flow.batch_size", "is now --caption.batching.rows-per-task"),
        ("--flow.batches-in-flight", "no longer exists: .*Remove the flag"),
    ],
)
def test_a_renamed_flag_names_its_successor(flag: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        _cli.parse("doc", lambda line: line.caption, ["demo", flag, "9"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system", "/data/runs"),
        GenericError("no answer from the store\n\nDebug source: a page"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),  # of a connection; stdout has a reader here
    ],
)
def test_a_storage_error_ends_a_job_with_one_sentence(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def run() -> None:
        raise error

    with pytest.raises(SystemExit, match="1"):
        _cli.main(run)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("StorageError: ")
    assert line.endswith("committed work is kept, run the same command again to resume")


def test_a_reader_that_ends_early_ends_a_job_without_a_word() -> None:
    script = "from jobs._cli import main; main(lambda: [print('x' * 99) for _ in range(100_000)])"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.readline()
        job.stdout.close()
        assert job.stderr.read() == b""
    assert job.returncode == 128 + signal.SIGPIPE


def test_the_listing_has_a_line_for_every_verb_and_recipe() -> None:
    text = listing()
    for name in (*VERBS, *RECIPES):
        assert f"\n  {name} " in text


def test_flags_change_the_recipe_and_the_placement() -> None:
    step, where = _cli.parse(
        "doc",
        lambda line: line.caption,
        ["easy-vqa", "--engine.kind=vllm", "--where.max-actors", "3", "--where.root=/data/x"],
    )
    assert step.engine.kind == "vllm"
    assert (where.max_actors, where.root) == (3, "/data/x")
    assert step.config == RECIPES["easy-vqa"]().caption.config


def test_on_this_machine_a_relative_root_is_made_absolute() -> None:
    flags = ["demo", "--where.root", "runs/x"]
    _, where = _cli.parse("doc", lambda line: line.caption, flags)
    assert where.root == str(Path("runs/x").absolute())
    _, where = _cli.parse("doc", lambda line: line.caption, ["demo"])
    assert where.root == str(Path("runs/demo").absolute())


@pytest.mark.parametrize("flags", [["--where.root=runs"], ["--where.root", "runs"], []])
def test_in_a_submitted_job_it_is_refused_with_what_to_write(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"write --where.root \$PWD/runs.*s3://bucket/runs"):
        _cli.parse("doc", lambda line: line.caption, ["demo", *flags])


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no recipe 'easy'.*easy-vqa"):
        _cli.parse("doc", lambda line: line.caption, ["easy"])


def test_a_recipe_without_the_step_says_so() -> None:
    with pytest.raises(ConfigError, match="'demo' has no such step"):
        _cli.parse("doc", lambda line: line.pretrain, ["demo"])


def test_a_wrong_value_ends_the_job_with_its_text_alone() -> None:
    argv = [sys.executable, "-m", "jobs.caption_images", "demo", "--where.min-actors=5"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ConfigError: actors must satisfy 1 <= min_actors <= max_actors" in done.stderr
    assert "Traceback" not in done.stderr


def test_datasets_that_can_be_built_are_and_the_others_say_what_they_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = Where(root=str(tmp_path / "root"))
    monkeypatch.setattr(sys, "argv", ["build_dataset", "easy-vqa", "--where.root", where.root])
    with pytest.raises(ArtifactMissing, match="teacher-captions@v1 is not finished"):
        build_dataset.run()
    capsys.readouterr()

    line = RECIPES["easy-vqa"]()
    without_drawn = IndexConfig(sources=(EasyVqaImages(split="train", name="easy-vqa"),))
    _steps.index_images(replace(line.images[0], config=without_drawn), where)
    _steps.index_questions(line.questions[0], where)
    build_dataset.run()
    lines = capsys.readouterr().out.splitlines()
    assert "captioner-data@v1: not yet, teacher-captions@v1 is not finished" in lines[1]
    assert lines[3].startswith("finetune-data@v1: ")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_plan_in_which_inputs_come_first(name: str) -> None:
    line = RECIPES[name]()
    made = set()
    if line.caption is not None and line.caption.captioner == embedded.CAPTIONER:
        made.add(str(embedded.CAPTIONER))
    if name.startswith("sharegpt4v"):
        made.add(str(paper.BASE))  # imported
    for step in plan(line, Where(root="/x")):
        part = step.args[0]
        for field in ("images", "dataset", "start", "captioner", "questions", "model"):
            ref = getattr(part, field, None)
            if type(ref).__name__ == "Ref":
                assert str(ref) in made, f"{part} needs {ref}"
        made.add(str(part.out))
    assert made, "a recipe does something"
