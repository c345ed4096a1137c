# SPDX-License-Identifier: Apache-2.0
"""Processes make the micro-batches that threads make, and none of them outlives training."""

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.where import Where
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.training.batch import MicroBatch, Rows
from sg4v_ray.training.loader import LoaderFailed
from tests.unit.rows_site import SIDE, make_batches, open_rows, write_samples

pytestmark = pytest.mark.training

TRAINER = """
import pickle, sys
from pathlib import Path
steps = pickle.loads(Path(sys.argv[1]).read_bytes()).steps(0)
for _ in range(10):
    next(steps)
print("made", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def rows(tmp_path: Path, tiny_model: Path) -> Rows:
    return open_rows(write_samples(tmp_path), tiny_model)


def _loaders() -> list[psutil.Process]:
    """Return the loader processes of this one, as torch names them: others have servers too."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if one.name() == "pt_data_worker"]


def _begun(steps: Iterator[list[MicroBatch]]) -> list[psutil.Process]:
    """Take a step, and return the two processes that make them."""
    next(steps)
    found = _loaders()
    assert len(found) == 2
    return found


def _check_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.mark.parametrize("first", [0, 3])
def test_two_processes_make_the_batches_of_threads_to_the_bit_from_any_step(
    rows: Rows, first: int
) -> None:
    threads = list(make_batches(rows, steps=10).steps(first))
    processes = list(make_batches(rows, steps=10, processes=2).steps(first))
    assert len(threads) == len(processes) == 10 - first
    for (ours,), (theirs,) in zip(threads, processes, strict=True):
        assert torch.equal(ours.input_ids_BT, theirs.input_ids_BT)
        assert torch.equal(ours.attention_mask_BT, theirs.attention_mask_BT)
        assert torch.equal(ours.labels_BT, theirs.labels_BT)
        assert torch.equal(ours.pixels_N3SS, theirs.pixels_N3SS)
        assert ours.counts == theirs.counts
    counts = sum((theirs.counts for (theirs,) in processes), Counter[str]())
    assert counts["rejected_missing"] + counts["rejected_truncated"] == counts["rejected"] > 0


def test_an_error_of_ours_in_a_process_is_raised_as_itself(rows: Rows) -> None:
    other = PixelMaker(size=2 * SIDE, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    with pytest.raises(ContractError, match=r"^an image has the shape \(16, 16, 3\), expected"):
        list(make_batches(rows, processes=2, pixels=other).steps(0))


def test_a_killed_process_is_an_error_and_no_wait_for_ever(rows: Rows) -> None:
    steps = make_batches(rows, processes=2, steps=10_000).steps(0)
    processes = _begun(steps)
    processes[0].kill()
    with pytest.raises(LoaderFailed, match=r"lower --where\.loader-processes"):
        list(steps)
    del steps
    _check_gone(processes)


@pytest.mark.parametrize("end", ["all steps", "an error between two"])
def test_no_process_outlives_the_steps(rows: Rows, end: str) -> None:
    steps = make_batches(rows, processes=2, steps=200).steps(0)
    processes = _begun(steps)
    if end == "all steps":
        assert len(list(steps)) == 199
    del steps
    _check_gone(processes)


def test_training_draws_the_same_numbers_with_and_without_processes(rows: Rows) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    list(islice(make_batches(rows, processes=2).steps(0), 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_a_process_gets_keeps_to_its_budget_and_takes_typed_specials_for_text(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = open_rows(write_samples(tmp_path), tiny_model, kept_bytes=0)
    sent: Rows = pickle.loads(pickle.dumps(rows))
    assert sent(0) is not sent(0)
    assert sent(1).token_ids.tolist() == rows(1).token_ids.tolist()


@pytest.mark.soak
def test_the_processes_of_a_killed_trainer_end_and_say_what_they_could_not_read(
    tmp_path: Path, rows: Rows
) -> None:
    (tmp_path / "batches").write_bytes(pickle.dumps(make_batches(rows, processes=2, steps=10_000)))
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "batches")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "made\n"
    below = psutil.Process(trainer.pid).children(recursive=True)
    assert len(below) == 4, "two loaders, their server and multiprocessing's tracker"
    trainer.kill()
    _check_gone(below)
    assert "sample missing " in trainer.communicate()[1]


def test_fewer_than_no_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loader_processes must be at least 0, got -1"):
        replace(Where(root=str(tmp_path)), loader_processes=-1)
