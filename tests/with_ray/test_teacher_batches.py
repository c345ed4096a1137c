# SPDX-License-Identifier: Apache-2.0
"""The batch mode as its users run it: killed, gone on with online, and its rejects asked again."""

import json
from pathlib import Path

import pytest

from sg4v_ray.core.artifact import is_finished
from sg4v_ray.exactly_once.monitor import STATUS
from tests.teacher_server.config import Always, BatchPlan, ServerConfig
from tests.teacher_server.running import serving
from tests.with_ray.collect_site import OUT, make_collect_site

pytestmark = [pytest.mark.teacher, pytest.mark.soak, pytest.mark.timeout(600)]

NUM_IMAGES = 60
IN_BATCHES = ("--mode=batch", "--batch.max-requests=25", "--batch.poll-s=0.5")


def test_a_killed_batch_run_is_finished_online_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    config = ServerConfig(batch_in_progress_s=25)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        site = make_collect_site(tmp_path, provider, NUM_IMAGES)
        home = site.storage.sub(OUT.path)
        driver = site.drive(*IN_BATCHES)
        driver.until(lambda: len({one["batch"] for one in provider.entries("batch_line")}) == 3)
        driver.until(lambda: home.exists(STATUS))
        status = json.loads(home.get(STATUS))
        assert (status["state"], status["total"]) == ("in batches", NUM_IMAGES)
        driver.kill()
        assert not is_finished(site.storage, OUT, config={})
        online = site.drive("--batch.poll-s=0.5")
        online.succeed()
        assert "waiting for 3 batches of an earlier run" in online.errors
        assert len(site.rows()) == NUM_IMAGES
        assert len(provider.entries("batch_line")) == NUM_IMAGES
        assert provider.entries("request") == []
        assert site.manifest().metrics["usd"] == pytest.approx(provider.billed_usd(), abs=1e-5)


def test_what_batches_leave_is_asked_online_and_rejects_again_when_wanted(tmp_path: Path) -> None:
    refused = Always(outcome="content_filter", tries=1)
    plans = (BatchPlan(expire=0.4), None)
    config = ServerConfig(batch_plans=plans, always=(refused,))
    with serving(config, tmp_path / "provider.jsonl") as provider:
        site = make_collect_site(tmp_path, provider, NUM_IMAGES)
        any_rejects = "--config.budget.max-reject-rate=1"
        site.drive(*IN_BATCHES, any_rejects).succeed()
        in_batches, online = provider.entries("batch_line"), provider.entries("request")
        assert (len(in_batches), len(online)) == (45, 15)
        assert {row.reject for row in site.rows()} == {"content_filter"}
        again = site.drive(any_rejects, "--reasons", "content_filter", job="jobs.retry_teacher")
        again.succeed()
        assert len(provider.entries("request")) == 15 + NUM_IMAGES
        assert all(row.text for row in site.rows())
        assert len(site.rows()) == NUM_IMAGES
        assert site.manifest().metrics["usd"] == pytest.approx(provider.billed_usd(), abs=1e-5)
