# SPDX-License-Identifier: Apache-2.0
"""The local provider's Batch API: every life of a batch, as the SDK sees it and as it is billed."""

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from tests.teacher_server.asking import client, fields, jpeg, sha
from tests.teacher_server.config import Always, BatchPlan, ServerConfig
from tests.teacher_server.running import Running, serving
from tests.teacher_server.wire import CHAT

pytestmark = pytest.mark.teacher

NEVER = jpeg(500)
REFUSED = jpeg(501)
FAST = {
    "batch_validating_s": 0.05,
    "batch_in_progress_s": 0.1,
    "batch_finalizing_s": 0.05,
}
PLANS = {
    "expire": BatchPlan(expire=0.6),
    "partial": BatchPlan(partial=0.4),
    "shuffle": BatchPlan(shuffle=True),
    "fail": BatchPlan(fail="invalid_json_line"),
    "drop": BatchPlan(drop_create=True),
}
ENDED = ("completed", "failed", "expired", "cancelled")


def lines(*images: bytes, **how: Any) -> list[dict[str, Any]]:
    common = {"method": "POST", "url": CHAT}
    bodies = [fields(image, **how) for image in images]
    return [{"custom_id": f"row-{n}", **common, "body": body} for n, body in enumerate(bodies)]


TEN = lines(*(jpeg(seed) for seed in range(10)))


def create(running: Running, requests: list[Any], **metadata: str) -> Batch:
    data = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in requests)
    api = client(running)
    uploaded = api.files.create(file=("rows.jsonl", data.encode()), purpose="batch")
    return api.batches.create(
        input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h", metadata=metadata
    )


def seen(running: Running, batch_id: str, until: Callable[[Batch], bool]) -> list[Batch]:
    """Look at a batch again and again; return what was seen."""
    end, looks = time.monotonic() + 10, []
    while not looks or not until(looks[-1]):
        assert time.monotonic() < end, f"still {looks[-1].status}"
        looks.append(client(running).batches.retrieve(batch_id))
        time.sleep(0.01)
    return looks


def ended(running: Running, batch_id: str) -> Batch:
    return seen(running, batch_id, lambda batch: batch.status in ENDED)[-1]


def read(running: Running, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(row) for row in client(running).files.content(file_id).text.splitlines()]


def billed(running: Running, batch_id: str) -> dict[str, float]:
    mine = [row for row in running.entries("batch_line") if row["batch"] == batch_id]
    return {row["custom_id"]: row["usd"] for row in mine if row["billed"]}


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return (
        batch.request_counts.total,
        batch.request_counts.completed,
        batch.request_counts.failed,
    )


@contextmanager
def provider_of(tmp_path: Path, **config: Any) -> Iterator[Running]:
    with serving(ServerConfig(**{**FAST, **config}), tmp_path / "log.jsonl") as running:
        yield running


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One batch for each of PLANS, already created; all later ones go well."""
    rules = (
        Always(outcome="500", image_sha=sha(NEVER)),
        Always(outcome="refusal", image_sha=sha(REFUSED)),
    )
    config = {"batch_plans": tuple(PLANS.values()), "always": rules}
    with provider_of(tmp_path_factory.mktemp("batches"), **config) as running:
        for name in PLANS:
            if name == "drop":
                with pytest.raises(openai.APIConnectionError):
                    create(running, TEN, name=name)
            else:
                create(running, TEN, name=name)
        yield running


@pytest.fixture(scope="module")
def planned(provider: Running) -> dict[str, Batch]:
    """The ends of those batches."""
    made = [one for one in client(provider).batches.list() if one.metadata]
    ends = [ended(provider, one.id) for one in made]
    return {one.metadata["name"]: one for one in ends if one.metadata and "name" in one.metadata}


def test_a_batch_goes_through_its_stages_and_answers_every_line(provider: Running) -> None:
    made = create(provider, TEN, job="seven")
    assert (made.status, made.metadata, counts(made)) == ("validating", {"job": "seven"}, (0, 0, 0))
    end = ended(provider, made.id)
    passed = [entry["status"] for entry in provider.entries("batch") if entry["batch"] == made.id]
    assert passed == ["validating", "in_progress", "finalizing", "completed"]
    stamps = (end.created_at, end.in_progress_at, end.finalizing_at, end.completed_at)
    assert list(stamps) == sorted(stamps, key=lambda at: at or 0)
    assert counts(end) == (10, 10, 0)
    assert end.error_file_id is None
    answers = read(provider, end.output_file_id)
    assert [row["custom_id"] for row in answers] == [row["custom_id"] for row in TEN]
    for row in answers:
        assert (row["error"], row["response"]["status_code"]) == (None, 200)
        assert row["response"]["body"]["choices"][0]["finish_reason"] == "stop"


def test_a_line_costs_half_of_the_same_request_online(provider: Running) -> None:
    made = create(provider, TEN[:1])
    ended(provider, made.id)
    client(provider).chat.completions.create(**TEN[0]["body"])
    online = provider.entries("request")[-1]
    assert billed(provider, made.id) == {"row-0": pytest.approx(online["usd"] / 2)}
    line = provider.entries("batch_line")[-1]
    assert (line["image"], line["prompt"]) == (online["image"], online["prompt"])


def test_the_window_may_close_on_unfinished_lines_which_cost_nothing(
    provider: Running, planned: dict[str, Batch]
) -> None:
    end = planned["expire"]
    assert (end.status, counts(end)) == ("expired", (10, 6, 0))
    assert end.expired_at is not None
    done, left = read(provider, end.output_file_id), read(provider, end.error_file_id)
    assert (len(done), len(left)) == (6, 4)
    assert {(row["response"], row["error"]["code"]) for row in left} == {(None, "batch_expired")}
    assert {*billed(provider, end.id)} == {row["custom_id"] for row in done}
    assert len({row["custom_id"] for row in done + left}) == 10


def test_lines_may_fail_one_by_one_and_cost_nothing(
    provider: Running, planned: dict[str, Batch]
) -> None:
    end = planned["partial"]
    assert (end.status, counts(end)) == ("completed", (10, 6, 4))
    failed = read(provider, end.error_file_id)
    assert Counter(row["response"]["status_code"] for row in failed) == {400: 2, 500: 2}
    assert all(row["response"]["body"]["error"]["message"] for row in failed)
    done = {row["custom_id"] for row in read(provider, end.output_file_id)}
    assert {*billed(provider, end.id)} == done


def test_results_may_come_in_another_order(provider: Running, planned: dict[str, Batch]) -> None:
    names = [row["custom_id"] for row in read(provider, planned["shuffle"].output_file_id)]
    assert names != sorted(names)
    assert sorted(names) == [row["custom_id"] for row in TEN]


def test_a_batch_may_fail_its_validation(provider: Running, planned: dict[str, Batch]) -> None:
    end = planned["fail"]
    assert end.status == "failed"
    assert end.errors is not None
    assert end.errors.data is not None
    assert [error.code for error in end.errors.data] == ["invalid_json_line"]
    assert (end.output_file_id, billed(provider, end.id)) == (None, {})


def test_a_batch_whose_creation_was_not_answered_is_there_all_the_same(
    provider: Running, planned: dict[str, Batch]
) -> None:
    end = planned["drop"]
    assert (end.status, counts(end)) == ("completed", (10, 10, 0))
    created = [entry for entry in provider.entries("batch") if entry["status"] == "validating"]
    assert [entry["batch"] for entry in created if entry["metadata"] == {"name": "drop"}] == [
        end.id
    ]


def test_rules_hold_for_lines_and_a_bad_line_spoils_no_other(provider: Running) -> None:
    end = ended(provider, create(provider, lines(NEVER, REFUSED, b"no JPEG", jpeg(1))).id)
    assert counts(end) == (4, 2, 2)
    failed = read(provider, end.error_file_id)
    assert [(row["custom_id"], row["response"]["status_code"]) for row in failed] == [
        ("row-0", 500),
        ("row-2", 400),
    ]
    refused = read(provider, end.output_file_id)[0]["response"]["body"]["choices"][0]["message"]
    assert refused["refusal"]
    assert {*billed(provider, end.id)} == {"row-1", "row-3"}


def test_a_batch_without_any_answer_has_no_output_file(provider: Running) -> None:
    end = ended(provider, create(provider, lines(NEVER)).id)
    assert (end.status, end.output_file_id) == ("completed", None)
    assert end.error_file_id is not None


@pytest.mark.parametrize(
    ("requests", "errors"),
    [
        pytest.param([TEN[0], "{"], [(2, "invalid_json_line")], id="no JSON"),
        pytest.param([TEN[0], TEN[0]], [(2, "duplicate_custom_id")], id="same custom_id"),
        pytest.param(
            [TEN[0], {**TEN[1], "url": "/v1/embeddings"}],
            [(2, "url_mismatch")],
            id="another endpoint",
        ),
        pytest.param([{**TEN[0], "method": "GET"}], [(1, "invalid_method")], id="GET"),
        pytest.param(
            [TEN[0], {**TEN[1], "body": fields(jpeg(1), model="gpt-4o-mini")}],
            [(2, "mismatched_model")],
            id="two models",
        ),
        pytest.param(
            [{**TEN[0], "custom_id": ""}, TEN[1], "[]"],
            [(1, "missing_required_parameter"), (3, "missing_required_parameter")],
            id="each error is told",
        ),
        pytest.param([], [(None, "empty_file")], id="empty"),
    ],
)
def test_a_bad_file_fails_the_batch_and_says_where(
    provider: Running, requests: list[Any], errors: list[tuple[int | None, str]]
) -> None:
    end = ended(provider, create(provider, requests).id)
    assert end.status == "failed"
    assert end.errors is not None
    assert end.errors.data is not None
    assert [(error.line, error.code) for error in end.errors.data] == errors
    assert billed(provider, end.id) == {}


def test_files_are_kept_until_they_are_deleted(provider: Running) -> None:
    api = client(provider)
    uploaded = api.files.create(file=("rows.jsonl", b"any"), purpose="batch")
    assert (uploaded.bytes, uploaded.filename, uploaded.purpose) == (3, "rows.jsonl", "batch")
    assert api.files.retrieve(uploaded.id) == uploaded
    assert api.files.content(uploaded.id).content == b"any"
    assert uploaded.id in [one.id for one in api.files.list(purpose="batch", limit=5)]
    assert api.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.content(uploaded.id)


def test_batches_are_listed_newest_first_in_pages(provider: Running) -> None:
    made = [create(provider, TEN[:1], number=str(n)).id for n in range(3)][::-1]
    first = client(provider).batches.list(limit=2)
    assert ([one.id for one in first.data], first.has_more) == (made[:2], True)
    assert client(provider).batches.list(limit=2, after=made[1]).data[0].id == made[2]
    every = [one.id for one in client(provider).batches.list(limit=2)]
    assert every[:3] == made
    assert len(every) == len(set(every)) >= len(PLANS) + 3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"endpoint": "/v1/embeddings"}, id="endpoint"),
        pytest.param({"completion_window": "1h"}, id="window"),
        pytest.param({"metadata": {"key": "long" * 200}}, id="metadata"),
        pytest.param({"metadata": {str(n): "" for n in range(17)}}, id="pairs"),
    ],
)
def test_a_batch_of_other_terms_is_not_created(provider: Running, change: dict[str, Any]) -> None:
    api = client(provider)
    uploaded = api.files.create(file=("rows.jsonl", b"{}"), purpose="batch")
    terms = {"input_file_id": uploaded.id, "endpoint": CHAT, "completion_window": "24h", **change}
    before = len(provider.entries("batch"))
    with pytest.raises(openai.BadRequestError):
        api.batches.create(**terms)
    validating = [e for e in provider.entries("batch")[before:] if e["status"] == "validating"]
    assert validating == []


def test_what_is_not_there_is_a_404_and_a_stranger_gets_a_401(provider: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        client(provider).batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError):
        client(provider).batches.create(
            input_file_id="file-none", endpoint=CHAT, completion_window="24h"
        )
    with pytest.raises(openai.AuthenticationError):
        client(provider, "sk-wrong").batches.list()


def test_a_cancelled_batch_keeps_and_bills_what_was_done(tmp_path: Path) -> None:
    with provider_of(tmp_path, batch_plans=(BatchPlan(in_progress_s=3.0),)) as running:
        made, api = create(running, TEN), client(running)
        seen(running, made.id, lambda batch: counts(batch)[1] >= 2)
        assert api.batches.cancel(made.id).status == "cancelling"
        assert api.batches.cancel(made.id).status == "cancelling"
        end = ended(running, made.id)
        done, left = read(running, end.output_file_id), read(running, end.error_file_id)
        with pytest.raises(openai.ConflictError, match="cancelled"):
            api.batches.cancel(made.id)
        assert (end.status, counts(end)) == ("cancelled", (10, len(done), 0))
        assert {*billed(running, made.id)} == {row["custom_id"] for row in done}
        assert {row["error"]["code"] for row in left} == {"batch_cancelled"}
        assert 2 <= len(done) < len(done) + len(left) == 10


def test_limits_of_files_lines_and_the_queue(tmp_path: Path) -> None:
    limits = {"max_batch_requests": 5, "max_file_bytes": 20_000, "max_enqueued_requests": 7}
    slow = BatchPlan(in_progress_s=1.5)
    with provider_of(tmp_path, batch_plans=(None, slow), **limits) as running:
        codes = functools.partial(_codes, running)
        assert codes(create(running, TEN[:6])) == ["too_many_tasks"]
        with pytest.raises(openai.APIStatusError) as caught:
            create(running, ["x" * 20_001])
        assert caught.value.status_code == 413
        first = create(running, TEN[:5])
        seen(running, first.id, lambda batch: batch.status == "in_progress")
        assert codes(create(running, TEN[:3])) == ["token_limit_exceeded"]
        assert codes(first) == []
        assert codes(create(running, TEN[:3])) == [], "there is room again"


def _codes(running: Running, batch: Batch) -> list[str | None]:
    end = ended(running, batch.id)
    errors = end.errors.data if end.errors and end.errors.data else []
    return [error.code for error in errors]
