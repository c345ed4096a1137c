# SPDX-License-Identifier: Apache-2.0
"""The local provider: every fault appears as configured, and its account adds up."""

import email.utils
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.teacher_server.answers import generate
from tests.teacher_server.asking import PROMPT, client, fields, jpeg, sha
from tests.teacher_server.config import OUTCOMES, UNBILLED, Always, ServerConfig
from tests.teacher_server.faults import Faults
from tests.teacher_server.limits import Limits
from tests.teacher_server.running import Running, serving
from tests.teacher_server.wire import image_tokens, parse_fields

pytestmark = pytest.mark.teacher

IMAGES = {outcome: jpeg(seed) for seed, outcome in enumerate(OUTCOMES)}
BY_IMAGE = tuple(Always(outcome=name, image_sha=sha(data)) for name, data in IMAGES.items())
CUT = jpeg(1000)
PLAIN = jpeg(2000)


def ask(running: Running, image: bytes, *, timeout: float = 10.0, **how: Any) -> ChatCompletion:
    return client(running).chat.completions.create(**fields(image, **how), timeout=timeout)


def last(running: Running, event: str = "request") -> dict[str, Any]:
    return running.entries(event)[-1]


def until(true: Callable[[], bool], timeout_s: float = 3.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One outcome for each of IMAGES; all others get captions."""
    config = ServerConfig(
        always=(*BY_IMAGE, Always(outcome="ok", image_sha=sha(PLAIN))),
        refuse_unless_prompt_sha=sha(PROMPT.encode()),
        retry_after_s=7,
    )
    with serving(config, tmp_path_factory.mktemp("provider") / "log.jsonl") as running:
        yield running


@contextmanager
def provider_of(tmp_path: Path, **config: Any) -> Iterator[Running]:
    with serving(ServerConfig(**config), tmp_path / "log.jsonl") as running:
        yield running


def test_the_sdk_gets_a_caption_and_the_account_has_what_its_usage_says(provider: Running) -> None:
    answer = ask(provider, PLAIN)
    text, usage, entry = answer.choices[0].message.content, answer.usage, last(provider)
    assert text is not None
    assert usage is not None
    assert usage.completion_tokens == len(text.split()) == entry["completion_tokens"]
    assert usage.prompt_tokens == len(PROMPT.split()) + 85 + 170 == entry["prompt_tokens"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert entry["usd"] == pytest.approx(
        usage.prompt_tokens * 2.5e-6 + usage.completion_tokens * 1e-5
    )
    assert (entry["image"], entry["prompt"]) == (sha(PLAIN), sha(PROMPT.encode()))
    assert abs(entry["at"] - time.time()) < 5


def test_captions_depend_on_image_and_prompt_only(provider: Running) -> None:
    texts = [
        ask(provider, image, text=prompt).choices[0].message.content
        for image, prompt in ((PLAIN, "a"), (PLAIN, "a"), (PLAIN, PROMPT), (CUT, PROMPT))
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_lengths_are_log_normal_around_the_median() -> None:
    config = ServerConfig(caption_tokens=50.0, caption_sigma=0.5)
    asked = [parse_fields(fields(PLAIN, text=str(seed))) for seed in range(200)]
    sizes = sorted(generate(one, "ok", config).num_tokens for one in asked)
    assert 44 < sizes[100] < 56
    assert sizes[-1] > 4 * sizes[0]


def test_max_tokens_cuts_the_caption_and_the_bill(provider: Running) -> None:
    answer = ask(provider, CUT, max_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    assert (last(provider)["outcome"], last(provider)["completion_tokens"]) == ("length", 12)


@pytest.mark.parametrize(
    ("width", "height", "detail", "tokens"),
    [
        pytest.param(1024, 1024, "high", 765, id="OpenAI's first example"),
        pytest.param(2048, 4096, "high", 1105, id="OpenAI's second example"),
        pytest.param(4096, 8192, "low", 85, id="OpenAI's third example"),
        pytest.param(512, 512, "high", 255, id="small images stay small"),
        pytest.param(640, 480, "auto", 425, id="COCO"),
        pytest.param(4000, 2, "high", 85 + 4 * 170, id="a line"),
    ],
)
def test_images_cost_what_openai_documents(
    width: int, height: int, detail: str, tokens: int
) -> None:
    assert image_tokens(width, height, detail) == tokens


@pytest.mark.parametrize(
    ("outcome", "status", "header"),
    [
        pytest.param("400", 400, {}, id="400"),
        pytest.param("429", 429, {"retry-after": "7"}, id="429 in seconds"),
        pytest.param("429_ms", 429, {"retry-after-ms": "7000"}, id="429 in milliseconds"),
        pytest.param("429_bare", 429, {}, id="429 without advice"),
        pytest.param("429_quota", 429, {}, id="no money left"),
        pytest.param("500", 500, {}, id="500"),
        pytest.param("503", 503, {}, id="503"),
        pytest.param("503_retry_after", 503, {"retry-after": "7"}, id="503 with advice"),
    ],
)
def test_errors_come_with_their_advice_and_cost_nothing(
    provider: Running, outcome: str, status: int, header: dict[str, str]
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(provider, IMAGES[outcome])
    got = {k: v for k, v in caught.value.response.headers.items() if k.startswith("retry-after")}
    assert (caught.value.status_code, got) == (status, header)
    assert caught.value.body["message"]  # type: ignore[index]
    entry = last(provider)
    assert (entry["outcome"], entry["billed"], entry["usd"]) == (outcome, False, 0.0)


def test_a_429_may_say_when_as_a_date(provider: Running) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        ask(provider, IMAGES["429_date"])
    when = email.utils.parsedate_to_datetime(caught.value.response.headers["retry-after"])
    assert 4 < when.timestamp() - time.time() <= 7


def test_an_empty_account_is_told_apart_from_a_rate_limit(provider: Running) -> None:
    codes = []
    for outcome in ("429", "429_quota"):
        with pytest.raises(openai.RateLimitError) as caught:
            ask(provider, IMAGES[outcome])
        codes.append(caught.value.code)
    assert codes == ["rate_limit_exceeded", "insufficient_quota"]


@pytest.mark.parametrize(
    ("outcome", "error", "billed"),
    [
        pytest.param("timeout", openai.APITimeoutError, True, id="no answer"),
        pytest.param("drop_before", openai.APIConnectionError, False, id="closed at once"),
        pytest.param("drop_after", openai.APIConnectionError, True, id="closed half way"),
        pytest.param("malformed", json.JSONDecodeError, True, id="half a JSON"),
    ],
)
def test_a_caption_that_does_not_arrive_is_billed_if_it_was_made(
    provider: Running, outcome: str, error: type[Exception], billed: bool
) -> None:
    with pytest.raises(error):
        ask(provider, IMAGES[outcome], timeout=0.5)
    entry = last(provider)
    assert (entry["outcome"], entry["billed"], entry["usd"] > 0) == (outcome, billed, billed)
    if outcome == "malformed":
        until(lambda: last(provider, "delivered")["n"] == entry["n"])
    else:
        time.sleep(0.05)
        assert last(provider, "delivered")["n"] < entry["n"]


@pytest.mark.parametrize(
    ("outcome", "content", "refusal", "finish"),
    [
        pytest.param("refusal", None, "I'm sorry", "stop", id="refusal"),
        pytest.param("refusal_prose", "I'm sorry", None, "stop", id="refusal in prose"),
        pytest.param("content_filter", "", None, "content_filter", id="content filter"),
        pytest.param("length", "", None, "length", id="cut off"),
    ],
)
def test_what_is_no_caption_is_billed_all_the_same(
    provider: Running, outcome: str, content: str | None, refusal: str | None, finish: str
) -> None:
    choice = ask(provider, IMAGES[outcome]).choices[0]
    assert choice.finish_reason == finish
    for got, wanted in ((choice.message.content, content), (choice.message.refusal, refusal)):
        assert (got is None) == (wanted is None)
        assert (got or "").startswith(wanted or "")
    assert last(provider)["billed"]


@pytest.mark.parametrize(
    ("outcome", "lie"),
    [
        pytest.param("usage_zero", lambda said, true: said.total_tokens == 0, id="zero"),
        pytest.param(
            "usage_negative", lambda said, true: said.completion_tokens < 0, id="negative"
        ),
        pytest.param(
            "usage_small", lambda said, true: 0 < said.total_tokens < true / 2, id="small"
        ),
        pytest.param("usage_total", lambda said, true: said.total_tokens == true + 7, id="sum"),
        pytest.param("usage_missing", lambda said, true: said is None, id="missing"),
    ],
)
def test_usage_may_lie_but_the_bill_is_true(
    provider: Running, outcome: str, lie: Callable[[Any, int], bool]
) -> None:
    answer, entry = ask(provider, IMAGES[outcome]), last(provider)
    text = answer.choices[0].message.content
    assert text is not None
    assert entry["completion_tokens"] == len(text.split())
    assert lie(answer.usage, entry["prompt_tokens"] + entry["completion_tokens"])


def test_a_refused_prompt_is_answered_when_the_base_one_is_asked(provider: Running) -> None:
    messages = [ask(provider, CUT, text=text).choices[0].message for text in ("Who?", PROMPT)]
    assert [message.refusal is None for message in messages] == [False, True]


def test_every_delivered_answer_is_noted_and_bears_the_number_of_its_request(
    provider: Running,
) -> None:
    headers = {"X-Client-Request-Id": "row-7"}
    create = client(provider).chat.completions.with_raw_response.create
    raw = create(**fields(PLAIN), extra_headers=headers)
    until(lambda: last(provider, "delivered")["n"] == last(provider)["n"])
    assert last(provider)["client_request_id"] == "row-7"
    assert raw.headers["x-request-id"] == f"req_{last(provider)['n']:012d}"


def test_a_wrong_key_gets_a_401_everywhere(provider: Running) -> None:
    stranger = client(provider, "sk-wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.AuthenticationError) as caught:
        stranger.chat.completions.create(**fields(PLAIN))
    assert caught.value.code == "invalid_api_key"
    assert (last(provider)["outcome"], last(provider)["billed"]) == ("401", False)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"{", id="no JSON"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"model":"m","messages":[{"role":"user","content":"hi"}]}', id="no image"),
        pytest.param(json.dumps(fields(b"no JPEG")).encode(), id="no JPEG"),
        pytest.param(json.dumps(fields(PLAIN, max_tokens="9")).encode(), id="limit is no number"),
        pytest.param(json.dumps(fields(PLAIN, detail="best")).encode(), id="unknown detail"),
    ],
)
def test_a_bad_request_gets_a_400_in_openais_shape(provider: Running, body: bytes) -> None:
    headers = {"Authorization": "Bearer sk-test"}
    answer = httpx.post(f"{provider.url}/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert (last(provider)["outcome"], last(provider)["usd"]) == ("400", 0.0)


def test_the_model_is_listed(provider: Running) -> None:
    assert [model.id for model in client(provider).models.list()] == ["gpt-4o"]


def draw(running: Running, num_images: int, tries: int) -> list[tuple[str, str]]:
    """Ask for each image several times; return images and outcomes in order."""
    with httpx.Client(headers={"Authorization": "Bearer sk-test"}) as http:
        for number in range(num_images * tries):
            body = fields(jpeg(number % num_images))
            http.post(f"{running.url}/chat/completions", json=body)
    return [(entry["image"], entry["outcome"]) for entry in running.entries("request")]


def test_faults_come_at_their_rates_and_again_for_the_same_seed() -> None:
    rates = {"500": 0.2, "refusal": 0.1, "usage_zero": 0.1}
    asked = [parse_fields(fields(jpeg(seed))) for seed in range(100)]
    drawn = []
    for seed in (1, 1, 2):
        faults = Faults(ServerConfig(faults=rates, seed=seed))
        drawn.append([[faults.draw(one) for one in asked] for _ in range(5)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1], "each try draws anew"
    counts = Counter(outcome for tries in drawn[0] for outcome in tries)
    assert set(counts) == {"ok", *rates}
    for outcome, rate in rates.items():
        assert abs(counts[outcome] / 500 - rate) < 0.05


def test_a_rule_may_hold_for_the_first_tries_only() -> None:
    faults = Faults(ServerConfig(always=(Always(outcome="503", tries=2),)))
    asked = [parse_fields(fields(jpeg(number % 2))) for number in range(8)]
    assert [faults.draw(one) for one in asked] == ["503"] * 4 + ["ok"] * 4


def test_another_prompt_than_the_base_one_is_refused_for_some_images() -> None:
    base = {"refuse_unless_prompt_sha": sha(PROMPT.encode()), "refuse_unless_share": 0.5}
    faults = Faults(ServerConfig(**base))
    images = [jpeg(seed) for seed in range(20)]
    other = {faults.draw(parse_fields(fields(image, text="Who is this?"))) for image in images}
    again = {faults.draw(parse_fields(fields(image))) for image in images}
    assert other == {"ok", "refusal"}
    assert again == {"ok"}


@pytest.mark.parametrize(
    ("limits", "let_in"),
    [
        pytest.param({"requests_per_window": 3}, [0, 1, 2, 10, 11, 12], id="requests"),
        pytest.param({"tokens_per_window": 250}, [0, 1, 10, 11], id="tokens"),
        pytest.param({}, [*range(15)], id="none"),
    ],
)
def test_a_window_slides(limits: dict[str, int], let_in: list[int]) -> None:
    window = Limits(ServerConfig(window_s=10.0, **limits))
    waits = {second: window.enter(100, float(second)) for second in range(15)}
    assert [second for second, wait_s in waits.items() if wait_s is None] == let_in
    if let_in[-1] < 14:
        assert waits[5] == 5, "the oldest leaves at 10"


@pytest.mark.parametrize(
    ("limits", "let_in"),
    [
        pytest.param({"requests_per_window": 3}, 3, id="requests"),
        pytest.param({"tokens_per_window": 3900, "count_max_tokens": True}, 3, id="tokens"),
    ],
)
def test_what_exceeds_a_rate_gets_a_429_that_says_when(
    tmp_path: Path, limits: dict[str, Any], let_in: int
) -> None:
    with provider_of(tmp_path, **limits) as running:
        outcomes = [outcome for _, outcome in draw(running, num_images=5, tries=1)]
        with pytest.raises(openai.RateLimitError) as caught:
            ask(running, PLAIN)
    assert outcomes == ["ok"] * let_in + ["429_limit"] * (5 - let_in)
    assert caught.value.code == "rate_limit_exceeded"
    assert 40 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_no_more_than_so_many_at_one_time(tmp_path: Path) -> None:
    with (
        provider_of(tmp_path, max_concurrent=2, latency_s=0.8) as running,
        ThreadPoolExecutor(5) as threads,
        httpx.Client(headers={"Authorization": "Bearer sk-test"}) as http,
    ):
        post = lambda _: http.post(f"{running.url}/chat/completions", json=fields(PLAIN))  # noqa: E731
        statuses = Counter(answer.status_code for answer in threads.map(post, range(5)))
    assert statuses == {200: 2, 429: 3}


def test_a_caption_is_billed_if_the_client_died_meanwhile(tmp_path: Path) -> None:
    with provider_of(tmp_path, latency_s=0.5) as running:
        with pytest.raises(openai.APITimeoutError):
            ask(running, PLAIN, timeout=0.2)
        until(lambda: bool(running.entries("request")))
        assert last(running)["billed"]
        time.sleep(0.05)
        assert running.entries("delivered") == []


def test_the_account_outlives_the_provider_and_goes_on_with_the_next(tmp_path: Path) -> None:
    with provider_of(tmp_path) as running:
        ask(running, PLAIN)
        os.kill(running.process.pid, signal.SIGKILL)
    before = running.billed_usd()
    with provider_of(tmp_path) as running:
        ask(running, PLAIN)
        assert [entry["n"] for entry in running.entries("request")] == [1, 2]
        assert running.billed_usd() == pytest.approx(2 * before)


def test_the_account_adds_up(tmp_path: Path) -> None:
    quick = {name: 0.04 for name in OUTCOMES if name not in ("ok", "timeout")}
    with provider_of(tmp_path, faults=quick) as running:
        with httpx.Client(headers={"Authorization": "Bearer sk-test"}) as http:
            for seed in range(150):
                try:
                    http.post(f"{running.url}/chat/completions", json=fields(jpeg(seed)))
                except httpx.TransportError:
                    continue
        entries = running.entries("request")
        billed = running.billed_usd()
    assert [entry["n"] for entry in entries] == list(range(1, 151))
    assert len({entry["outcome"] for entry in entries}) > 12
    for entry in entries:
        assert entry["billed"] == (entry["outcome"] not in UNBILLED) == (entry["usd"] > 0)
    tokens = [sum(e[f"{kind}_tokens"] for e in entries) for kind in ("prompt", "completion")]
    assert billed == pytest.approx((tokens[0] * 2.5 + tokens[1] * 10) / 1e6)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"faults": {"teapot": 0.1}}, id="unknown outcome"),
        pytest.param({"faults": {"500": 0.6, "503": 0.6}}, id="more than one"),
        pytest.param({"faults": {"500": -0.1}}, id="negative"),
    ],
)
def test_impossible_faults_fail_before_the_provider_starts(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"outcome|probabilities"):
        ServerConfig(**fields)
