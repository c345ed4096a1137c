# SPDX-License-Identifier: Apache-2.0
"""A deadline sizes the pool by measured speed, and a money cap ends a job that can go on."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from jobs import _steps
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core import observe
from sg4v_ray.core.artifact import is_finished
from sg4v_ray.core.errors import MoneySpent
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.exactly_once.monitor import STATUS, curves
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.recipes.line import CaptionStep
from tests.with_ray.caption_site import CAPTIONER, Site, make_site

pytestmark = pytest.mark.usefixtures("ray_cluster")


def captioning() -> CaptionStep:
    """Captioning at 10 images a second and actor: 8 rows at once, about 40 steps of 20 ms each."""
    step = RECIPES["demo"]().caption
    assert step is not None
    engine = EngineConfig(kind="fake", max_model_len=512, capacity=8, latency_s=0.02)
    batching = Batching(rows_per_part=16, rows_per_task=8)
    config = replace(step.config, quality=QualityConfig(min_words=1))
    return replace(step, config=config, engine=engine, captioner=CAPTIONER, batching=batching)


def where(site: Site, **changes: Any) -> Where:
    return Where(root=site.storage.root, engine_cpus=0.5, progress=False, **changes)


@pytest.mark.scale
def test_finish_by_measures_and_then_asks_for_the_actors_that_make_it(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 400)
    step = captioning()
    with caplog.at_level("INFO", logger="sg4v_ray"):
        _steps.caption_images(step, where(site, max_actors=4, finish_by="25s"))
    site.check_exactly_once()
    sized = re.search(r"rows/s per actor: (\d) actors from now on", caplog.text)
    assert sized is not None
    (curve,) = curves(site.storage.sub(step.out.path))
    actors = [point["actors"] for point in curve]
    assert 1 < max(actors) <= int(sized[1]), curve
    assert all(point["actors"] <= 1 for point in curve if point["rows"] < 64), curve


def exported() -> set[str]:
    """Return the metrics of ours that this machine's Prometheus endpoint has now."""
    (node,) = ray.nodes()
    found = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    return {line.partition("{")[0] for line in found.text.splitlines() if "ray_sg4v_" in line[:9]}


def test_engines_with_a_share_of_a_gpu_caption_and_show_their_rate(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 12)
    _steps.caption_images(captioning(), replace(where(site, engine_gpus=0.5), progress=True))
    site.check_exactly_once()
    last = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
    assert re.search(r"12/12 \[\d\d:\d\d, ETA 00:00, [\d.]+ rows/s, \d+ tokens/s, 0 reject", last)


@pytest.mark.scale
def test_a_job_that_is_late_takes_what_there_is_and_says_so_and_prometheus_has_its_metrics(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 240, gone=1)
    late = where(site, max_actors=16, finish_by="2s", engine_gpus=0.5, gpu_hour_usd=1.0)
    job = threading.Thread(target=_steps.caption_images, args=(captioning(), late))
    job.start()
    seen: set[str] = set()
    while job.is_alive():
        job.join(1)
        seen |= exported()
    site.check_exactly_once()
    assert "finish_by 2s cannot be met: it needs" in caplog.text
    assert "Raise --where.max-actors" in caplog.text
    # 16 of them would leave no CPU to the tasks that feed them, and the job would wait for ever.
    assert "max_actors is 16, but only 7 fit into the cluster" in caplog.text
    assert seen >= {
        f"ray_{one.name}{'_total' if one.kind == 'counter' else ''}"
        for one in vars(observe).values()
        if isinstance(one, observe.Metric)
        and not one.name.startswith(("sg4v_train", "sg4v_teacher", "sg4v_serve"))
    }


@pytest.mark.scale
def test_money_ends_a_job_before_it_is_spent_and_more_money_goes_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    site = make_site(str(tmp_path / "runs"), tmp_path, tiny_model, 400)
    step = captioning()
    priced = {"engine_gpus": 0.5, "gpu_hour_usd": 1.0}
    with pytest.raises(MoneySpent, match=r"stopped at \$.* raise --where.max-usd and run again"):
        _steps.caption_images(step, where(site, max_usd=0.0045, **priced))
    assert not is_finished(site.storage, step.out, config={})
    status = json.loads(site.storage.get(f"{step.out.path}/{STATUS}"))
    assert status["state"] == "stopped"
    assert 0 < status["usd_so_far"] <= 0.0045 < status["usd_expected"]
    kept = site.committed()
    assert kept > 0
    _steps.caption_images(step, where(site, max_usd=1.0, max_actors=4, **priced))
    site.check_exactly_once()
    assert json.loads(site.storage.get(f"{step.out.path}/{STATUS}"))["state"] == "finished"
