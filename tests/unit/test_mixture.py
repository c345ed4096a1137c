# SPDX-License-Identifier: Apache-2.0
"""A mix replaces LLaVA's detailed captions, says what by what, and touches nothing else."""

import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import mix_dataset
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ArtifactDrift, ArtifactMissing, ConfigError, ContractError
from sg4v_ray.core.json_array import Element
from sg4v_ray.core.where import Where
from sg4v_ray.dataset import mixture
from sg4v_ray.dataset.choose import Share
from sg4v_ray.dataset.details import QUESTIONS_OF_THE_FILE
from sg4v_ray.dataset.layout import source_of
from sg4v_ray.dataset.mixture import PUBLISHED, MixConfig, run

pytestmark = pytest.mark.teacher

OUT = Ref(name="sft-mix")
DETAIL = QUESTIONS_OF_THE_FILE[1]


def record(key: str | int, image: str | None, *said: str, **keys: Any) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(said)
    turns = [{"from": who, "value": text} for who, text in zip(speakers, said, strict=False)]
    head = {"id": key} if image is None else {"id": key, "image": image}
    return {**head, **keys, "conversations": turns}


def coco(number: int) -> str:
    return f"coco/train2017/{number:012d}.jpg"


def detail(number: int) -> dict[str, Any]:
    return record(f"{number:012d}", coco(number), f"{DETAIL}\n<image>", f"Old {number}.")


def caption(key: str, image: str) -> dict[str, Any]:
    return record(key, image, "Describe it.\n<image>", f"New of {image}.\n\nMore.")


KEPT = [
    record("000000000001", coco(1), "<image>\nIs it red?", "No.", "And blue?", "Yes."),
    record(2_404_787, "vg/VG_100K/2404787.jpg", f"<image>\n{DETAIL}", "A street."),
    record("a_0", None, DETAIL, "Which image?", model=""),
    record("000000000002", coco(2), "<image>\nWhy does he smile?", "He won."),
]
SFT = [KEPT[0], detail(1), KEPT[1], detail(2), detail(3), KEPT[2], detail(4), KEPT[3]]
CAPTIONS = [
    *(caption(f"{n:012d}", coco(n)) for n in (2, 4, 11, 12, 13)),
    *(caption(f"sa_{n}", f"sam/images/sa_{n}.jpg") for n in range(5)),
    *(caption(f"w{n}", f"wikiart/images/{n}.jpg") for n in range(2)),
]


class Site:
    """The files of a test and what is made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, Where(root=str(folder / "root"), progress=False)
        self.sft(SFT)
        self.captions(CAPTIONS)
        self.config = MixConfig(
            sft=f"{folder}/sft.json", captions=f"{folder}/captions.json", seed=1
        )

    def sft(self, records: list[dict[str, Any]]) -> None:
        (self.folder / "sft.json").write_text(json.dumps(records, indent=2))

    def captions(self, records: list[dict[str, Any]]) -> None:
        (self.folder / "captions.json").write_text(json.dumps(records, ensure_ascii=False))

    def mix(self, version: str = "v1", **changes: Any) -> list[dict[str, Any]]:
        out = Ref(name="sft-mix", version=version)
        run(replace(self.config, **changes), out=out, where=self.where)
        return json.loads(self.where.storage.get(f"{out.path}/mix.json"))

    def report(self) -> dict[str, Any]:
        return json.loads(self.where.storage.get(f"{OUT.path}/report.json"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def by_source(records: list[dict[str, Any]]) -> Counter[str]:
    return Counter(source_of(one.get("image")) for one in records)


def test_what_is_no_detailed_caption_stays_letter_by_letter_and_in_order(site: Site) -> None:
    mixed = site.mix()
    assert [one for one in mixed if one not in CAPTIONS] == KEPT
    assert not [one for one in mixed if one["conversations"][1]["value"].startswith("Old")]


def test_a_caption_of_the_same_image_stands_at_the_place_of_the_old_one(site: Site) -> None:
    mixed = site.mix()
    assert len(mixed) == len(SFT)
    assert (mixed[3], mixed[6]) == (CAPTIONS[0], CAPTIONS[1])


def test_equal_takes_the_same_image_then_the_same_source_then_any(site: Site) -> None:
    site.captions(CAPTIONS[:2] + CAPTIONS[4:])
    mixed = site.mix()
    came = [one for one in mixed if one in CAPTIONS]
    assert (by_source(came)["coco"], len(came)) == (3, 4)
    assert CAPTIONS[4] in came, "the third of COCO"
    assert site.report()["replaced_about_the_same_image"] == 2


def test_shares_take_so_many_of_each_source(site: Site) -> None:
    take = (Share(source="sam", captions=4), Share(source="wikiart", captions=2))
    mixed = site.mix(take=take)
    assert by_source(mixed) - by_source(KEPT) == {"sam": 4, "wikiart": 2}
    assert len(mixed) == len(KEPT) + 6
    assert all(one in CAPTIONS for one in mixed[-2:]), "what finds no place is behind the end"


def test_fewer_captions_than_places_leave_the_last_places_empty(site: Site) -> None:
    mixed = site.mix(take=(Share(source="sam", captions=2),))
    assert [one in CAPTIONS for one in mixed] == [False, True, False, True, False, False]


def test_the_published_shares_make_the_published_number_of_records() -> None:
    assert sum(one.captions for one in PUBLISHED) == 23_000
    assert 665_298 - 23_240 + 23_000 == 665_058


def test_the_order_of_the_caption_file_changes_nothing_and_the_seed_everything(site: Site) -> None:
    many = [caption(f"{n}", f"sam/images/{n}.jpg") for n in range(50)]
    take = (Share(source="sam", captions=3),)
    site.captions(many)
    first = site.mix(take=take)
    site.captions(random.Random(3).sample(many, 50))
    assert site.mix("v2", take=take) == first
    assert site.mix("v3", take=take, seed=2) != first


def test_nor_does_it_where_an_id_repeats(site: Site) -> None:
    same = [record("7", "sam/images/7.jpg", "Describe it.", f"Text {n}.") for n in range(4)]
    take = (Share(source="sam", captions=1),)
    site.captions(same)
    first = site.mix(take=take)
    site.captions(same[::-1])
    assert site.mix("v2", take=take) == first


def test_the_report_counts_by_source_and_names_each_pair(site: Site) -> None:
    site.mix(take=(Share(source="sam", captions=3),))
    report = site.report()
    assert report["all"] == {"before": 8, "removed": 4, "added": 3, "after": 7}
    assert report["sources"]["coco"] == {"before": 6, "removed": 4, "added": 0, "after": 2}
    assert report["sources"]["sam"] == {"before": 0, "removed": 0, "added": 3, "after": 3}
    card = site.where.storage.get(f"{OUT.path}/README.md").decode()
    assert "| all | 8 | 4 | 3 | 7 |" in card
    lines = site.where.storage.get(f"{OUT.path}/replaced.jsonl").decode().splitlines()
    pairs = [json.loads(one) for one in lines]
    assert [one["removed"] for one in pairs] == [f"{n:012d}" for n in (1, 2, 3, 4)]
    assert [one["place"] for one in pairs] == [1, 3, 4, 6]
    assert pairs[0]["added"].startswith("sa_") and pairs[3]["added"] is None


def test_the_reports_name_no_folder_of_this_machine(site: Site) -> None:
    site.mix()
    for name in ("report.json", "README.md", "replaced.jsonl"):
        assert str(site.folder) not in site.where.storage.get(f"{OUT.path}/{name}").decode()


def test_missing_captions_are_an_error_or_are_reported(site: Site) -> None:
    take = (Share(source="sam", captions=9), Share(source="lcs", captions=1))
    with pytest.raises(ContractError, match=r"4 of sam, 1 of lcs are missing.*allow-missing"):
        site.mix(take=take)
    assert by_source(site.mix(take=take, allow_missing=True))["sam"] == 5
    assert site.report()["missing"] == {"sam": 4, "lcs": 1}
    assert "missing: 4 of sam" in site.where.storage.get(f"{OUT.path}/README.md").decode()


def test_equal_with_too_few_captions_says_how_many(site: Site) -> None:
    site.captions(CAPTIONS[:3])
    with pytest.raises(ContractError, match="1 of any are missing"):
        site.mix()
    assert len(site.mix(allow_missing=True)) == len(SFT) - 1


@pytest.mark.parametrize(("expected", "sft"), [(5, SFT), (None, KEPT)])
def test_another_number_of_detailed_captions_than_expected_is_an_error(
    site: Site, expected: int | None, sft: list[dict[str, Any]]
) -> None:
    site.sft(sft)
    with pytest.raises(ContractError, match=r"detailed captions, expected are .*config\.details"):
        site.mix(expect_removed=expected)


def test_a_failed_mix_leaves_no_artifact_and_the_next_one_is_whole(site: Site) -> None:
    text = json.dumps(SFT)
    (site.folder / "sft.json").write_text(text[:-20])
    with pytest.raises(ContractError, match="record 7 at byte"):
        site.mix()
    with pytest.raises(ArtifactMissing):
        find(site.where.storage, OUT)
    assert not site.where.storage.exists(f"{OUT.path}/mix.json")
    site.sft(SFT)
    assert len(site.mix()) == len(SFT)


def test_a_finished_mix_is_opened_and_one_of_other_files_is_refused(site: Site) -> None:
    site.mix()
    before = site.where.storage.get(f"{OUT.path}/manifest.json")
    site.mix()
    assert site.where.storage.get(f"{OUT.path}/manifest.json") == before
    site.captions(CAPTIONS[1:])
    with pytest.raises(ArtifactDrift, match=r"inputs\.captions"):
        site.mix()


def test_a_file_of_detailed_captions_says_what_goes(site: Site) -> None:
    known = [record("000000000002", "000000000002.jpg", "Any question?", "He won."), detail(3)]
    (site.folder / "details.json").write_text(json.dumps(known))
    mixed = site.mix(details=f"{site.folder}/details.json")
    assert KEPT[3] not in mixed and detail(3) not in mixed
    assert detail(1) in mixed, "another answer than that of the file"


def test_images_without_their_folder_get_one_or_the_mix_would_have_two_roots(site: Site) -> None:
    bare = [{**one, "image": one["image"].rpartition("/")[2]} for one in SFT if "image" in one]
    site.sft([one for one in bare if one["image"] != "2404787.jpg"])
    with pytest.raises(ContractError, match=r"record 0 at byte 4 .*coco-folder coco/train2017"):
        site.mix()
    mixed = site.mix(coco_folder="coco/train2017")
    assert {one["image"].rpartition("/")[0] for one in mixed} == {"coco/train2017"}
    assert site.report()["replaced_about_the_same_image"] == 2


def test_a_file_that_changes_between_the_two_readings_makes_no_mix(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = mixture.records_at, Counter[str]()

    def cut(uri: str, *, bar: str | None) -> Iterator[Element]:
        seen[uri] += 1
        yield from itertools.islice(whole(uri, bar=bar), 7 if seen[uri] == 2 else None)

    monkeypatch.setattr(mixture, "records_at", cut)
    with pytest.raises(ContractError, match="was changed while it was read"):
        site.mix()


def test_the_job_prints_the_table_and_where_the_mix_lies(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--config.sft", site.config.sft, "--config.captions", site.config.captions]
    more = ["--config.expect-removed", "4", "--where.root", site.where.root]
    monkeypatch.setattr(sys, "argv", ["mix_dataset", "sft-mix-equal", *files, *more])
    mix_dataset.run()
    lines = capsys.readouterr().out.splitlines()
    assert "| all | 8 | 4 | 4 | 8 |" in lines
    place = f"{site.where.root}/sft-mix/v1/mix.json"
    assert lines[-1] == f"sft-mix@v1: 8 records, 4 removed, 4 added: {place}"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(record("x", None, "Describe it.", "Text."), id="no image"),
        pytest.param(record("x", coco(9), "Describe it.", "One.", "More?", "Two."), id="two turns"),
        pytest.param(record("x", coco(9), "Describe it."), id="no answer"),
        pytest.param(record("x", coco(9), "Describe it.", " \n"), id="empty answer"),
    ],
)
def test_what_is_no_caption_does_not_come_in(site: Site, bad: dict[str, Any]) -> None:
    site.captions([CAPTIONS[0], bad])
    with pytest.raises(ContractError, match=r"record 1 at byte [\d,]+ is no caption"):
        site.mix()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sft": "data/mix.json"}, "is relative"),
        ({"captions": "https://a.org/x.json"}, "scheme"),
        ({"file": "a/b.json"}, "plain name"),
        ({"file": "mix.txt"}, "plain name"),
        ({"file": "report.json"}, "is taken"),
        ({"coco_folder": "/data"}, "below the data folder"),
        ({"take": (Share(source="sam", captions=1),) * 2}, "twice"),
    ],
)
def test_a_bad_config_fails_before_a_file_is_read(
    site: Site, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        replace(site.config, **change)


def test_a_share_of_no_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="no source 'cocoa'; there are coco"):
        Share(source="cocoa", captions=1)
    with pytest.raises(ConfigError, match="at least 1"):
        Share(source="coco", captions=0)
