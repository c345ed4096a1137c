# SPDX-License-Identifier: Apache-2.0
"""Training on a real Ray cluster with DeepSpeed: what may happen to a run and must not change it.

`reference` is the run that nothing happened to. test_training_loop.py holds what one process shows.
"""

import contextlib
import random
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from sg4v_ray.core.artifact import Manifest, Ref
from sg4v_ray.core.errors import ArtifactDrift, ConfigError
from sg4v_ray.model.conversation import Conversation
from sg4v_ray.model.weights import create, load
from sg4v_ray.training import checkpoint, launch
from sg4v_ray.training.batch import RowRules, Rows
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.lengths import read_lengths
from sg4v_ray.training.samples import open_samples
from tests.with_ray.training_driver import newest_step, start_driver, training_workers, wait_for
from tests.with_ray.training_site import DATASET, STAGE, TINY, Site, make_site

pytestmark = [pytest.mark.training, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Site:
    return make_site(tmp_path_factory.mktemp("training"), tiny_model / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(site: Site, ray_cluster: None) -> Manifest:
    return site.run("reference")


def test_the_loss_falls_and_every_sample_is_counted(reference: Manifest) -> None:
    losses = reference.metrics["losses"]
    assert reference.metrics["exported_step"] == len(losses)
    assert len(losses) == reference.counts["steps"] == 24  # 60 samples, 8 a step, 3 epochs
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert reference.counts["samples"] == 180
    assert reference.counts["rejected"] == reference.counts["rejected_truncated"] == 3


def test_frozen_weights_are_those_of_the_start_to_the_bit(site: Site, reference: Manifest) -> None:
    before, after = create(TINY, seed=3).state_dict(), site.weights("reference")
    frozen = {
        f"vision_tower.vision_model.{name.removeprefix('model.vision_tower.')}": name
        for name in before
        if name.startswith("model.vision_tower.") and ".layers.1." not in name
    }
    assert len(frozen) > 20
    assert all(torch.equal(after[ours], before[name]) for ours, name in frozen.items())
    moved = "language_model.lm_head.weight"
    assert not torch.equal(after[moved], before["lm_head.weight"])


def test_the_model_folder_is_complete_and_what_the_manifest_says(
    site: Site, reference: Manifest
) -> None:
    folder = site.storage.localise("reference/v1/model", cache=site.root, digests=reference.digests)
    model = load(folder, dtype="float32")
    assert model.config.text_config.hidden_size == TINY.text_width
    assert Conversation.open(folder, "vicuna_v1").image_token_id == TINY.image_token_id
    assert launch.model_config(reference) == TINY
    assert not (site.root / "reference" / "v1" / checkpoint.FOLDER).exists()


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_three_killed_workers_and_three_killed_drivers_leave_the_weights_to_the_bit(
    site: Site, tmp_path: Path, ray_cluster: None
) -> None:
    stage = replace(STAGE, epochs=15.0, save_every_steps=2)
    undisturbed = site.run("undisturbed", stage)
    ref = Ref(name="killed")
    job = {
        "config": stage,
        "start": site.fresh(),
        "dataset": DATASET,
        "out": ref,
        "where": site.where(),
    }
    home, draw = site.storage.sub(ref.path), random.Random(5)

    def wait_for_steps(more: int, driver: "subprocess.Popen[bytes]") -> None:
        goal = newest_step(home) + more
        wait_for(lambda: newest_step(home) >= goal, still=lambda: driver.poll() is None)

    for _ in range(3):
        driver = start_driver(job, tmp_path)
        wait_for_steps(draw.randint(2, 6), driver)
        draw.choice(training_workers()).kill()
        wait_for_steps(draw.randint(2, 6), driver)
        driver.kill()
        driver.wait()
        assert newest_step(home) < 120, "the run was over before its driver was killed"

    finished = site.run("killed", stage)
    assert len(finished.metrics["resumed_at"]) == 6
    assert finished.metrics["losses"] == undisturbed.metrics["losses"]
    assert finished.counts == undisturbed.counts
    expected, got = site.weights("undisturbed"), site.weights("killed")
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


def _loaders() -> list[psutil.Process]:
    """The loader processes of this test's own Ray cluster, as torch names them."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends, or has ended, while we look
            if one.name() == "pt_data_worker" and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_killed_loader_process_is_a_restart_that_changes_no_weight_and_none_is_left(
    site: Site, reference: Manifest
) -> None:
    home, killed = site.storage.sub(Ref(name="loaders").path), []

    def kill_one() -> None:
        wait_for(lambda: newest_step(home) > 0, still=threading.main_thread().is_alive)
        killed.append(_loaders()[0])
        killed[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    done = launch.run(
        STAGE,
        start=site.fresh(),
        dataset=DATASET,
        out=Ref(name="loaders"),
        where=replace(site.where(), loader_processes=2),
    )
    killer.join()
    assert len(done.metrics["resumed_at"]) == len(killed) == 1
    assert done.metrics["losses"] == reference.metrics["losses"]
    assert done.counts == reference.counts
    expected, got = site.weights("reference"), site.weights("loaders")
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    _, alive = psutil.wait_procs(_loaders(), timeout=60)
    assert not alive


def test_rows_sorted_by_length_are_all_trained_on_and_their_lengths_are_those_of_the_rows(
    site: Site, tmp_path: Path, ray_cluster: None
) -> None:
    stage = replace(STAGE, length_window=2, epochs=1.0)
    done = site.run("sorted", stage)
    assert done.counts["samples"] == 60
    home = site.storage.sub(Ref(name="sorted").path)
    measured = read_lengths(home)
    (tmp_path / "tokenizer.json").write_bytes(site.tokenizer.read_bytes())
    rules = RowRules(
        geometry=stage.geometry,
        image_size=TINY.image_size,
        num_image_tokens=TINY.num_image_tokens,
        max_length=stage.max_length,
        image_limits=stage.image_limits,
    )
    samples = open_samples(site.storage, DATASET)
    rows = Rows(samples, Conversation.open(tmp_path, stage.template), rules)
    made = [rows(index) for index in range(60)]
    good = [index for index, row in enumerate(made) if row.reject is None]
    assert len(good) == 59, "one image is broken, and its length is that of a whole one"
    assert [len(made[index].token_ids) for index in good] == measured.tokens[good].tolist()
    assert [row.uri is not None for row in map(samples.__getitem__, range(60))] == (
        measured.has_image.tolist()
    )


def test_a_finished_model_is_opened_and_another_config_is_refused(
    site: Site, reference: Manifest
) -> None:
    assert site.run("reference") == reference
    smaller = replace(STAGE, micro_batch=1, zero_stage=3, gradient_checkpointing=True)
    assert site.run("reference", smaller) == reference, "how it fits into memory is no identity"
    with pytest.raises(ArtifactDrift, match="learning_rate"):
        site.run("reference", replace(STAGE, learning_rate=1e-4))


@pytest.mark.parametrize(
    ("stage", "workers", "message"),
    [
        pytest.param(replace(STAGE, max_length=5), 2, "no room for text", id="too short"),
        pytest.param(replace(STAGE, max_length=999), 2, "positions of tiny", id="too long"),
        pytest.param(replace(STAGE, micro_batch=1), 8, "the cluster has", id="too many"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    site: Site, stage: StageConfig, workers: int, message: str
) -> None:
    where = replace(site.where(workers), worker_cpus=1.0)
    out = Ref(name="refused")
    with pytest.raises(ConfigError, match=message):
        launch.run(stage, start=site.fresh(), dataset=DATASET, out=out, where=where)
    assert not (site.root / "refused").exists()


@pytest.mark.soak
def test_zero_3_learns_the_same_and_exports_whole_weights(site: Site, reference: Manifest) -> None:
    sharded = site.run("sharded", replace(STAGE, zero_stage=3))
    assert sharded.metrics["losses"] == pytest.approx(reference.metrics["losses"], rel=1e-4)
    expected, got = site.weights("reference"), site.weights("sharded")
    assert {name: one.shape for name, one in got.items()} == {
        name: one.shape for name, one in expected.items()
    }
