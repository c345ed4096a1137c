# SPDX-License-Identifier: Apache-2.0
"""Each image is asked and paid once, whatever kills the job or goes wrong on the wire."""

import random
from pathlib import Path

import pytest

from sg4v_ray.captions.ledger import KILLED
from sg4v_ray.core.artifact import is_finished
from tests.teacher_server.config import ServerConfig
from tests.teacher_server.running import Running, serving
from tests.with_ray.collect_site import OUT, CollectSite, make_collect_site

pytestmark = [pytest.mark.teacher, pytest.mark.timeout(1800)]

LOST_ON_THE_WIRE = {"timeout", "drop_before", "drop_after", "malformed"}
FAULTS = {
    **dict.fromkeys(("429", "429_ms", "429_date", "503_retry_after"), 0.003),
    **dict.fromkeys(("429_bare", "503"), 0.002),
    **dict.fromkeys(("500", *LOST_ON_THE_WIRE), 0.01),
    **dict.fromkeys(("refusal", "refusal_prose", "content_filter", "length"), 0.01),
    **dict.fromkeys(("usage_missing", "usage_zero", "usage_negative"), 0.01),
    **dict.fromkeys(("usage_small", "usage_total"), 0.01),
}


def sent(provider: Running) -> int:
    """Return how many requests the provider has seen."""
    return len(provider.entries("request"))


@pytest.mark.parametrize(
    ("kills", "num_images"), [(1, 120), pytest.param(5, 2000, marks=pytest.mark.soak)]
)
def test_a_job_that_is_killed_pays_nothing_twice_but_what_was_on_its_way(
    tmp_path: Path, kills: int, num_images: int
) -> None:
    config = ServerConfig(faults=FAULTS, latency_s=0.5, random_latency_s=1.5)
    with serving(config, tmp_path / "provider.jsonl") as provider:
        site = make_collect_site(tmp_path, provider, num_images)
        rng = random.Random(kills)
        for number in range(kills):
            goal = num_images * (number + rng.random()) / (kills + 0.5)
            driver = site.drive()
            driver.until(lambda goal=goal: sent(provider) >= goal)
            driver.kill()
            assert not is_finished(site.storage, OUT, config={})
        site.drive().succeed()
        check(site, most_on_their_way=64 * kills)
        before = sent(provider)
        site.drive().succeed()
        assert sent(provider) == before, "a finished collection sends nothing"


def check(site: CollectSite, *, most_on_their_way: int) -> None:
    """Assert one outcome an image, and that the job's account and the provider's agree."""
    rows = site.rows()
    assert len(rows) == len({row.id for row in rows}) == site.num_images
    assert all((row.text is None) != (row.reject is None) for row in rows)
    assert sum(row.text is not None for row in rows) > 0.9 * site.num_images
    site.check_nothing_paid_twice_but_what_is_reported()
    requests = {one["client_request_id"]: one for one in site.provider.entries("request")}
    for lost in site.lost():
        outcome = requests.get(lost["ticket"], {}).get("outcome")
        assert lost["why"] == KILLED or outcome in LOST_ON_THE_WIRE, (lost, outcome)
    never_sent = [one for one in site.lost() if one["ticket"] not in requests]
    # Noted, and killed before it went out: nobody can tell that from an answer that got lost.
    assert len(never_sent) <= len([one for one in site.lost() if one["why"] == KILLED])
    assert len([one for one in site.lost() if one["why"] == KILLED]) <= most_on_their_way
    facts = site.manifest().metrics
    assert facts["usd"] >= site.provider.billed_usd() - 1e-6
    assert facts["lost_requests"] == len(site.lost())
