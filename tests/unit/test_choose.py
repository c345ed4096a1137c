# SPDX-License-Identifier: Apache-2.0
"""The teacher's images are drawn by source and seed; who has too few is said."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from sg4v_ray.captions.choose import SampleConfig, Share, choose
from sg4v_ray.captions.collect import CollectConfig
from sg4v_ray.captions.estimate import SourceEstimate, estimate, table
from sg4v_ray.captions.ledger import Ledger, Sent
from sg4v_ray.captions.prompts import prompt
from sg4v_ray.captions.session import LEDGER
from sg4v_ray.captions.teacher import Endpoint, Reply, TeacherConfig, asked_key
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.price import PriceTable
from sg4v_ray.core.rate import Limits
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.sampling import HoldOut, draw, sample
from sg4v_ray.core.where import Where
from sg4v_ray.recipes.teacher import PAPER_SAMPLE
from tests.row_artifacts import finish_rows
from tests.teacher.desk_site import picture

pytestmark = pytest.mark.teacher

IMAGES = Ref(name="images")
TEACHER = TeacherConfig(model="gpt-4o", max_tokens=1024)
OBJECTS, ART = "objects-2026-11", "artwork-2026-11"


def index(**counts: int) -> pa.Table:
    pairs = [(f"{name}/{n}", name) for name, count in counts.items() for n in range(count)]
    return pa.table({"id": [key for key, _ in pairs], "source": [name for _, name in pairs]})


def config(*shares: Share, seed: int = 1, aesthetic_rate: float = 0.0) -> SampleConfig:
    return SampleConfig(shares=shares, seed=seed, aesthetic_rate=aesthetic_rate)


COCO = Share(source="coco", prompt=OBJECTS, count=50)


def test_so_many_of_each_source_with_its_prompt() -> None:
    art = Share(source="wikiart", prompt=ART)
    rows, short = choose(index(coco=400, wikiart=30, sam=10), config(COCO, art))
    assert Counter(zip(rows["source"].to_pylist(), rows["prompt"].to_pylist(), strict=True)) == {
        ("coco", OBJECTS): 50,
        ("wikiart", ART): 30,
    }
    assert not short


def test_the_same_images_whatever_the_order_and_others_with_another_seed() -> None:
    rows = index(coco=400)
    first = set(choose(rows, config(COCO))[0]["id"].to_pylist())
    backwards = rows.take(list(range(399, -1, -1)))
    assert set(choose(backwards, config(COCO))[0]["id"].to_pylist()) == first
    assert set(choose(rows, config(COCO, seed=2))[0]["id"].to_pylist()) != first


def test_a_source_with_too_few_gives_all_and_is_named() -> None:
    rows, short = choose(index(coco=20), config(COCO))
    assert len(rows) == 20
    assert short == {"coco": (50, 20)}


def test_a_source_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"'coco'; there are sam, wikiart"):
        choose(index(sam=1, wikiart=1), config(COCO))


def test_a_share_of_the_images_is_asked_for_aesthetics_too() -> None:
    rows, _ = choose(
        index(coco=2000), config(Share(source="coco", prompt=OBJECTS), aesthetic_rate=0.1)
    )
    judged = [one for one in rows["prompt"].to_pylist() if one.endswith("-aesthetic")]
    assert 150 < len(judged) < 250


def test_the_papers_composition_is_102_000_images() -> None:
    counts = {one.source: one.count for one in PAPER_SAMPLE.shares}
    small = dict.fromkeys(("textcaps", "wikiart", "web-landmark", "web-celebrity"), 500)
    assert counts == {"coco": 50_000, "lcs": 30_000, "sam": 20_000, **small}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: config(), "at least one"),
        (lambda: config(COCO, COCO), "each source once"),
        (lambda: config(COCO, aesthetic_rate=1.5), "aesthetic_rate"),
        (lambda: Share(source="coco", prompt="nice"), "no teacher prompt 'nice'"),
        (lambda: Share(source="coco", prompt=OBJECTS, count=0), "at least 1"),
        (
            lambda: config(Share(source="a", prompt="detailed-2026-11"), aesthetic_rate=0.1),
            "no aesthetic variant",
        ),
    ],
)
def test_a_sample_that_cannot_be_fails_before_any_work(make: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make()  # type: ignore[operator]


def test_a_larger_sample_contains_a_smaller_one() -> None:
    keys = [str(n) for n in range(1000)]
    assert set(sample(keys, 10, 1, "x")) < set(sample(keys, 20, 1, "x"))
    assert sample(keys, 2000, 1, "x") and len(sample(keys, 2000, 1, "x")) == 1000
    assert draw("a", 1, "x") != draw("a", 1, "y")


def test_what_is_held_out_is_so_many_of_each_source() -> None:
    rows = [(f"{source}/{n}", source) for source in ("coco", "sam") for n in range(50)]
    held = HoldOut(per_source=7, seed=3).of(rows)
    assert Counter(key.split("/")[0] for key in held) == {"coco": 7, "sam": 7}
    assert held == HoldOut(per_source=7, seed=3).of(reversed(rows))


@pytest.fixture
def where(tmp_path: Path) -> Where:
    where = Where(root=str(tmp_path / "root"))
    rows = []
    for number in range(30):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(picture(number, size=(600, 600)))
        source = "coco" if number < 20 else "wikiart"
        rows.append(ImageRow(id=str(number), source=source, uri=str(file), size_bytes=1))
    finish_rows(where.storage, IMAGES, ImageRow, rows)
    return where


def estimated(where: Where) -> list[SourceEstimate]:
    return estimate(
        CollectConfig(
            sample=config(COCO, Share(source="wikiart", prompt=ART)),
            teacher=TEACHER,
        ),
        Endpoint(
            base_url="https://nobody",
            prices=PriceTable(input_usd_per_mtok=2.5, output_usd_per_mtok=10.0),
            limits=Limits(requests_per_min=10),
        ),
        images=IMAGES,
        where=where,
    )


def test_an_estimate_says_images_tokens_dollars_and_hours_by_source(where: Where) -> None:
    found = estimated(where)
    coco, art, both = found
    assert (coco.images, coco.wanted, art.images, both.images) == (20, 50, 10, 30)
    assert coco.completion_tokens == 20 * 214, "942 characters"
    assert 20 * (765 + 60) < coco.prompt_tokens < 20 * (765 + 200), "four tiles and a prompt"
    assert coco.usd == pytest.approx((2.5 * coco.prompt_tokens + 10 * coco.completion_tokens) / 1e6)
    assert coco.usd_in_batches == pytest.approx(coco.usd / 2)
    assert both.usd == pytest.approx(coco.usd + art.usd)
    assert both.hours == pytest.approx(3 / 60)
    assert "20 of 50" in table(found)


def asked(where: Where, row: int, config: TeacherConfig = TEACHER) -> Sent:
    """Return the note of a request about a row, as a desk makes it."""
    text = prompt(OBJECTS if row < 20 else ART)
    return Sent(f"t{row}", f"k{row}", str(row), "a@v1", 0.01, asked=asked_key(config, text.sha256))


async def earlier_run(where: Where, *notes: Sent) -> None:
    """Note an answer for each request."""
    reply = Reply(
        text="A dog.",
        reject=None,
        detail=None,
        finish_reason="stop",
        prompt_tokens=900,
        completion_tokens=3,
        usage_is_sound=True,
    )
    ledger = Ledger(where.storage.sub(LEDGER), writer=1)
    await ledger.sent_together(list(notes))
    await asyncio.gather(*(ledger.paid(one.ticket, 0.01, reply) for one in notes))


def test_an_estimate_leaves_out_what_an_earlier_run_has_an_answer_for(where: Where) -> None:
    before = estimated(where)[0]
    other = replace(TEACHER, max_tokens=5)
    asyncio.run(earlier_run(where, asked(where, 0), asked(where, 1), asked(where, 2, other)))
    after = estimated(where)[0]
    assert (after.images, after.answered) == (20, 2)
    assert after.usd == pytest.approx(before.usd * 18 / 20, rel=0.01)


def test_an_estimate_of_what_is_answered_already_is_nothing(where: Where) -> None:
    asyncio.run(earlier_run(where, *(asked(where, n) for n in range(30))))
    *_, both = estimated(where)
    assert (both.images, both.answered, both.usd) == (30, 30, 0.0)
