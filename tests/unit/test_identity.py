# SPDX-License-Identifier: Apache-2.0
"""Fingerprints outlive releases: new fields, new names and new defaults change none."""

import asyncio
import dataclasses
import hashlib
import json
import shutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sg4v_ray.captions.batches import Batches, BatchLimits
from sg4v_ray.captions.charges import Ask
from sg4v_ray.captions.choose import SampleConfig, Share
from sg4v_ray.captions.collect import CollectConfig
from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.estimate import estimate
from sg4v_ray.captions.ledger import Ledger, Paid
from sg4v_ray.captions.prompts import BASE_2026_11, WEB_2026_11
from sg4v_ray.captions.session import LEDGER
from sg4v_ray.captions.teacher import (
    Endpoint,
    ImageSent,
    Teacher,
    TeacherConfig,
    answer_key,
    answer_keys,
    asked_keys,
)
from sg4v_ray.core import identity
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.config import content_of, to_plain
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.identity import (
    classes,
    differences,
    fingerprint_of,
    identity_form,
    identity_keys,
    stored_identity_form,
)
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.training.config import PLACED
from tests.unit.identity_configs import CAPTIONS, CONFIGS, NANO, STAGE, TEACHER

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED: dict[str, Any] = json.loads((GOLDEN / "identity_defaults.json").read_text())
STORED: dict[str, Any] = json.loads((GOLDEN / "configs_0_1.json").read_text())
RUNS = Path(__file__).parents[1] / "data" / "runs-0.1"

ENGINE = {"kind": "hf", "dtype": "bfloat16", "max_model_len": 2048}
SENT = {"prompt_sha256": "1" * 64, "image_sha256": "2" * 64}

HOW_TO_RELEASE = """
tests/golden/identity_defaults.json holds every class, field and default ever released. An entry is
added and never changed, because finished artifacts and paid answers are found by it:
- a changed default: give the old one in `first_defaults` of @identity_keys
- a renamed class or field: keep its key
- a removed field, a removed class or another meaning of a field: raise `schema` of @identity_keys,
  which makes new configs differ from all old ones, and write the new entry with that schema
- a new field or class: add its entry, which is
"""


def as_released(found: identity.ClassIdentity) -> dict[str, Any]:
    """Return the entry of a class in the golden file."""
    return {
        "schema": found.schema,
        "name_in_0_1": found.name_in_0_1,
        "defaults": dict(found.defaults),
        "without_default": sorted(
            set(found.keys.values()) - set(found.defaults) - set(found.excluded)
        ),
        "excluded": sorted(found.excluded),
    }


def test_every_default_ever_released_is_kept() -> None:
    present = {key: as_released(found) for key, found in classes().items()}
    for key in sorted(RELEASED.keys() | present.keys()):
        entry = json.dumps({key: present.get(key)}, indent=1, sort_keys=True)
        assert present.get(key) == RELEASED.get(key), f"{key}: {HOW_TO_RELEASE}{entry}"


def test_three_fingerprints_are_pinned() -> None:
    captioning = {"captions": content_of(CAPTIONS), "engine": ENGINE}
    assert fingerprint_of(captioning) == "36de1a22b64aee7d"
    training = {key: one for key, one in content_of(STAGE).items() if key not in PLACED}
    assert fingerprint_of(training) == "ab3d67f82638ad74"
    assert answer_key(TEACHER, **SENT, attempt=1) == "c356fdb27e67fa39"


def test_an_identity_is_that_of_the_config_itself() -> None:
    assert fingerprint_of(content_of(CAPTIONS)) == fingerprint_of(CAPTIONS)
    training = {key: one for key, one in content_of(STAGE).items() if key not in PLACED}
    assert fingerprint_of({"stage": training, "model": NANO, "seed": 3}) == fingerprint_of(
        {"stage": STAGE, "model": NANO, "seed": 3}
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_stored_by_0_1_is_equal_to_the_same_config(name: str) -> None:
    config, stored = CONFIGS[name], STORED[name]
    form = identity_form(config)
    assert stored_identity_form(stored) == json.loads(json.dumps(form))
    assert differences({"config": stored}, {"config": config}) == []
    stripped = {key: one for key, one in stored.items() if key not in ("budget", "fetch")}
    assert stored_identity_form({"captions": stripped}) == {
        "captions": stored_identity_form(stored)
    }
    assert stored_identity_form(form) == form
    assert identity_form({"config": to_plain(config)}) == {"config": form}


def test_every_class_that_0_1_stored_is_there() -> None:
    no_identity = {"FetchConfig", "RejectBudget", "RetryPolicy"}
    there = {one.name_in_0_1 for one in classes().values()}
    assert set(types_in(STORED)) - no_identity <= there


def types_in(plain: Any) -> Iterator[str]:
    """Yield every `type` below a stored config."""
    if isinstance(plain, dict):
        if "type" in plain:
            yield plain["type"]
        plain = list(plain.values())
    if isinstance(plain, list):
        for one in plain:
            yield from types_in(one)


def test_every_class_that_an_identity_can_hold_has_keys() -> None:
    found: set[type] = set()
    for config in CONFIGS.values():
        find_classes(type(config), found)
    lacking = {one.__name__ for one in found} - {one.__name__ for one in identity._CLASSES}
    assert not lacking


def find_classes(annotation: Any, found: set[type]) -> None:
    """Add the dataclasses that a field may hold, without what is excluded from identity."""
    is_config = dataclasses.is_dataclass(annotation) and isinstance(annotation, type)
    if is_config and annotation not in found:
        found.add(annotation)
        keys = identity._CLASSES.get(annotation)
        for name, hint in typing.get_type_hints(annotation).items():
            if keys is None or keys.keys[name] not in keys.excluded:
                find_classes(hint, found)
    for one in typing.get_args(annotation):
        find_classes(one, found)


def test_values_that_decide_no_row_are_no_identity() -> None:
    changed = replace(
        CAPTIONS,
        budget=RejectBudget(max_reject_rate=0.5),
        fetch=FetchConfig(allow_hosts=("example.org",)),
    )
    assert fingerprint_of(changed) == fingerprint_of(CAPTIONS)
    assert fingerprint_of(replace(CAPTIONS, geometry="square")) != fingerprint_of(CAPTIONS)
    for change in (
        {"budget": RejectBudget(max_reject_rate=0.5)},
        {"micro_batch": 2},
        {"micro_tokens": 8192},
        {"zero_stage": 2},
        {"gradient_checkpointing": False},
        {"save_every_steps": 10},
    ):
        assert fingerprint_of(replace(STAGE, **change)) == fingerprint_of(STAGE)
    assert fingerprint_of(replace(STAGE, seed=1)) != fingerprint_of(STAGE)


@contextmanager
def a_release() -> Iterator[None]:
    """Start with no class, as the process of another release."""
    with mock.patch.object(identity, "_CLASSES", {}):
        yield


def first_release() -> tuple[str, dict[str, Any]]:
    """Return fingerprint and stored form of a config of the first release."""
    with a_release():

        @identity_keys("Ask", model="model", tokens="tokens")
        @dataclass(frozen=True)
        class Asking:
            model: str
            tokens: int = 5

        return fingerprint_of(Asking("m")), {"type": "Ask", "model": "m", "tokens": 5}


def test_a_new_field_with_its_default_changes_no_fingerprint() -> None:
    old, stored = first_release()
    with a_release():

        @identity_keys("Ask", model="model", tokens="tokens", top_p="top_p")
        @dataclass(frozen=True)
        class Asking:
            model: str
            tokens: int = 5
            top_p: float = 1.0

        assert fingerprint_of(Asking("m")) == old
        assert differences(stored, Asking("m")) == []
        assert fingerprint_of(Asking("m", top_p=0.5)) != old
        assert differences(stored, Asking("m", top_p=0.5)) == ["top_p: 1.0 there, 0.5 here"]


def test_new_names_with_the_old_keys_change_no_fingerprint() -> None:
    old, stored = first_release()
    with a_release():

        @identity_keys("Ask", teacher="model", max_tokens="tokens")
        @dataclass(frozen=True)
        class TeacherRequest:
            teacher: str
            max_tokens: int = 5

        config = TeacherRequest("m")
        assert fingerprint_of(config) == fingerprint_of(to_plain(config)) == old
        assert differences(stored, config) == []
        assert differences(stored, TeacherRequest("m", 6)) == ["max_tokens: 5 there, 6 here"]


def test_a_changed_default_keeps_the_fingerprint_of_the_old_value() -> None:
    old, stored = first_release()
    with a_release():

        @identity_keys("Ask", model="model", tokens="tokens", first_defaults={"tokens": 5})
        @dataclass(frozen=True)
        class Asking:
            model: str
            tokens: int = 9

        assert fingerprint_of(Asking("m", tokens=5)) == old
        assert fingerprint_of(Asking("m")) != old
        assert differences(stored, Asking("m")) == ["tokens: 5 there, 9 here"]
        assert differences(identity_form(Asking("m")), Asking("m")) == []


def test_a_default_that_came_later_leaves_no_value_out() -> None:
    old, _ = first_release()
    with a_release():
        first = {"model": dataclasses.MISSING}

        @identity_keys("Ask", model="model", tokens="tokens", first_defaults=first)
        @dataclass(frozen=True)
        class Asking:
            model: str = "m"
            tokens: int = 5

        assert fingerprint_of(Asking()) == old


def test_a_new_meaning_is_a_new_schema_and_differs_from_every_old_config() -> None:
    old, stored = first_release()
    with a_release():

        @identity_keys("Ask", schema=2, model="model", tokens="tokens")
        @dataclass(frozen=True)
        class Asking:
            model: str
            tokens: int = 5

        assert fingerprint_of(Asking("m")) != old
        assert differences(stored, Asking("m")) == ["schema: 1 there, 2 here"]
        form = identity_form(Asking("m"))
        assert stored_identity_form(form) == form


def test_differences_name_the_path_and_both_values() -> None:
    stored = {"config": STORED["dataset, all changed"], "inputs": {"captions@v2": "a"}}
    config = CONFIGS["dataset, all changed"]
    part = replace(config.parts[0], only_words=())
    changed = {
        "config": replace(config, parts=(part, *config.parts[1:]), seed=8),
        "inputs": {"captions@v2": "b"},
    }
    assert differences(stored, changed) == [
        "config.parts[0].only_words: ['red', 'circle'] there, [] here",
        "config.seed: 7 there, 8 here",
        "inputs.captions@v2: 'a' there, 'b' here",
    ]
    sources = CONFIGS["index"].sources
    other = replace(CONFIGS["index"], sources=(sources[1], sources[0], *sources[2:]))
    assert differences(STORED["index"], other) == [
        "sources[0].type: 'Folder' there, 'Glob' here",
        "sources[1].type: 'Glob' there, 'Folder' here",
    ]


def test_a_class_that_is_gone_stays_as_it_was_stored_and_differs() -> None:
    gone = {"type": "Gone", "a": 1}
    assert stored_identity_form({"sources": [gone]}) == {"sources": [gone]}
    assert differences(gone, TEACHER) == ["type: 'Gone' there, 'TeacherConfig' here"]
    more = {**STORED["collection"]["teacher"], "gone": 1}
    assert differences(more, TEACHER) == ["gone: 1 there, nothing here"]


def test_keys_are_checked_when_a_class_is_made() -> None:
    @dataclass
    class Asking:
        model: str
        tokens: int = 5

    for keys, message in (
        ({"model": "model"}, "no key for tokens"),
        ({"model": "m", "tokens": "t", "gone": "g"}, "no field for gone"),
        ({"model": "same", "tokens": "same"}, "must differ"),
        ({"model": "type", "tokens": "t"}, "must differ"),
        ({"model": "m", "tokens": "t", "excluded": ("gone",)}, "no such field: gone"),
        ({"model": "m", "tokens": "t", "first_defaults": {"gone": 1}}, "no such field: gone"),
        ({"model": "m", "tokens": "t", "schema": 0}, "at least 1"),
    ):
        with pytest.raises(TypeError, match=message):
            identity_keys("Ask", **keys)(Asking)
    with pytest.raises(TypeError, match="takes the identity key 'TeacherConfig' of"):
        identity_keys("TeacherConfig", model="m", tokens="t")(Asking)
    with pytest.raises(TypeError, match="above @dataclass"):
        identity_keys("Ask")(object)
    with pytest.raises(ConfigError, match=r'Asking .* put @identity_keys\("Asking"'):
        identity_form({"config": Asking("m")})


def test_values_without_a_stable_form_are_refused() -> None:
    for value in (float("nan"), {1, 2}, object(), {1: "a"}):
        with pytest.raises(ConfigError):
            identity_form([value])


def test_answers_of_0_1_are_looked_up_by_the_keys_of_0_1() -> None:
    changed = CONFIGS["collection, all changed"].teacher
    # Computed by commit 58447b5.
    assert answer_keys(TEACHER, **SENT, attempt=1)[1:] == ("def92291a3a9d30b",)
    assert answer_keys(TEACHER, **SENT, attempt=2)[1:] == ("b2886596a3ddd1ce",)
    assert asked_keys(TEACHER, SENT["prompt_sha256"])[1:] == ("d6fcb5fd5b88f587",)
    assert answer_keys(changed, **SENT, attempt=1)[1:] == ("eff97e588e33929b",)
    assert answer_keys(changed, **SENT, attempt=2)[1:] == ("7d244663bf9c832f",)
    assert asked_keys(changed, SENT["prompt_sha256"])[1:] == ("c8729846d0cc9f2f",)


def test_a_config_that_0_1_could_not_have_has_no_key_of_0_1() -> None:
    with mock.patch.object(identity, "_CLASSES", dict(identity._CLASSES)):

        @identity_keys(
            "Later", model="model", max_tokens="m", temperature="t", image="image", top_p="top_p"
        )
        @dataclass(frozen=True, kw_only=True)
        class Later(TeacherConfig):
            max_tokens: int = 1024
            temperature: float = 0.0
            image: ImageSent = ImageSent()
            top_p: float = 1.0

        assert len(answer_keys(Later(model="gpt-4o"), **SENT, attempt=1)) == 2
        assert len(answer_keys(Later(model="gpt-4o", top_p=0.5), **SENT, attempt=1)) == 1


NOWHERE = Endpoint(base_url="http://127.0.0.1:9/v1", api_key_env=None)
ASKED = TeacherConfig(model="gpt-4o", max_tokens=64)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the root that 0.1.0 made."""
    return Path(shutil.copytree(RUNS / "root", tmp_path / "root"))


def desk_of(home: Storage) -> Desk:
    """Return a desk that cannot send anything."""
    teacher = Teacher(ASKED, NOWHERE, key="no-key")
    return Desk(teacher, NOWHERE, Ledger(home, writer=None), job="another@v1")


def image_sha256(number: int) -> str:
    """Return the hash of an image that 0.1.0 asked about."""
    return hashlib.sha256((RUNS / "images" / f"{number:02d}.png").read_bytes()).hexdigest()


def test_every_answer_paid_under_0_1_is_found_without_a_request(root: Path) -> None:
    asks = [
        *(Ask(f"{n:02d}.png", b"", image_sha256(n), WEB_2026_11) for n in range(12)),
        Ask("03.png", b"", image_sha256(3), BASE_2026_11),  # its second try after a refusal
        Ask("03.png", b"", image_sha256(3), WEB_2026_11, attempt=2),
    ]

    async def ask_all() -> tuple[list[Any], Desk]:
        desk = desk_of(Storage(str(root / LEDGER)))
        return [await desk.ask(one) for one in asks], desk

    answers, desk = asyncio.run(ask_all())
    assert all(isinstance(one, Paid) for one in answers)
    assert {one.ticket for one in answers} == {one.ticket for one in desk.ledger.answers.values()}
    assert [one.row for one in answers] == [one.row for one in asks]
    assert (desk.counts.known, desk.counts.sent) == (14, 0)


def test_the_estimate_counts_images_answered_under_0_1(root: Path) -> None:
    share = Share(source="folder", prompt=WEB_2026_11.name)
    config = CollectConfig(sample=SampleConfig(shares=(share,)), teacher=ASKED)
    where = Where(root=str(root))
    total = estimate(config, NOWHERE, images=Ref(name="images"), where=where)[-1]
    assert (total.images, total.answered) == (12, 12)
    other = replace(config, teacher=replace(ASKED, max_tokens=65))
    with mock.patch("sg4v_ray.captions.estimate.read_images", return_value=[]):
        assert estimate(other, NOWHERE, images=Ref(name="images"), where=where)[-1].answered == 0


def test_a_request_in_an_open_batch_of_0_1_is_not_put_into_another(tmp_path: Path) -> None:
    ask = Ask("00.png", b"", image_sha256(0), WEB_2026_11)
    keys = answer_keys(
        ASKED, prompt_sha256=ask.prompt.sha256, image_sha256=ask.image_sha256, attempt=1
    )
    note = {"event": "sent", "ticket": "t", "key": keys[1], "row": ask.row, "usd": 0.01}
    batch = {"event": "batch", "batch": "b", "provider_id": "p", "url": NOWHERE.base_url}
    notes = [{**note, "job": "another@v1", "batch": "b"}, batch]
    text = "".join(f"{json.dumps(one)}\n" for one in notes)
    Storage(str(tmp_path)).put("notes/000001-00000001.jsonl", text.encode())

    async def put() -> int:
        desk = desk_of(Storage(str(tmp_path)))
        batches = Batches(desk, Teacher(ASKED, NOWHERE, key="no-key"), NOWHERE, BatchLimits())
        await batches.resume()
        await batches.add(ask)
        return batches.counts().requests

    assert asyncio.run(put()) == 1
    other = Desk(
        Teacher(ASKED, NOWHERE, key="no-key"),
        NOWHERE,
        Ledger(Storage(str(tmp_path)), writer=None),
        job="a-third@v1",
    )
    with pytest.raises(ConfigError, match="in a batch of another@v1"):
        other.refuse_what_others_ask(other.keys(ask), ask.row)
