# SPDX-License-Identifier: Apache-2.0
"""Of two drivers of one artifact one does the work; the other ends with a sentence, or opens it."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import _steps
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.artifact import Manifest, find, is_finished
from sg4v_ray.core.lease import Lease, hold
from sg4v_ray.core.storage import Storage, local_path
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once import stage
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.recipes.easy_vqa import CAPTIONS
from tests.waiting import eventually
from tests.with_ray.caption_site import CAPTIONER, Site, make_site

pytestmark = pytest.mark.timeout(2400)


def written(site: Site) -> dict[str, int]:
    """Return the time of the last write of each object of the artifact, in ns, without leases."""
    folder = site.storage.sub(CAPTIONS.path)
    return {
        path: local_path(folder.uri(path)).stat().st_mtime_ns
        for path in folder.list()
        if not path.startswith("lease/")
    }


def submit_two(site: Site) -> None:
    """Submit two drivers at once and one right after the commit; check their ends."""
    drivers = [site.drive() for _ in range(2)]
    eventually(lambda: is_finished(site.storage, CAPTIONS, config=None), within_s=600)
    late, committed = site.drive(), written(site)
    codes = [driver.wait() for driver in drivers]
    late.succeed()
    assert written(site) == committed, "a driver wrote after the commit"
    site.check_exactly_once()
    parts = [path for path in committed if path.endswith(".parquet")]
    assert parts == [file.path for file in find(site.storage, CAPTIONS).files]
    if codes != [0, 0]:  # else the second came after the commit, and opened it as well
        assert sorted(codes) == [0, 1]
        refused = drivers[codes.index(1)].errors
        assert refused.rstrip().splitlines()[-1].startswith("LeaseHeld: another job")
        assert "Traceback" not in refused


@pytest.mark.scale
def test_of_two_drivers_submitted_at_once_one_does_the_work_and_a_late_one_opens_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    for number in range(10):  # test_exactly_once.py has one round
        submit_two(make_site(str(tmp_path / f"runs-{number}"), tmp_path, tiny_model, 64))


@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_that_takes_the_lease_just_after_the_commit_captions_nothing(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 32)
    step = RECIPES["demo"]().caption
    assert step is not None
    step = replace(
        step,
        config=replace(step.config, quality=QualityConfig(min_words=1)),
        engine=EngineConfig(kind="fake", max_model_len=512, capacity=16),
        captioner=CAPTIONER,
        batching=Batching(rows_per_part=16, rows_per_task=8),
    )
    where = Where(root=site.storage.root, engine_cpus=0.5, progress=False)
    first: list[tuple[Manifest, dict[str, int]]] = []

    def hold_after_another_commit(folder: Storage) -> AbstractContextManager[Lease]:
        monkeypatch.setattr(stage, "hold", hold)
        first.append((_steps.caption_images(step, where), written(site)))
        return hold(folder)

    # Called after the first check whether the artifact is finished.
    monkeypatch.setattr(stage, "hold", hold_after_another_commit)
    opened = _steps.caption_images(step, where)
    assert (opened, written(site)) == first[0]
    site.check_exactly_once()
