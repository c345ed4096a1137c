# SPDX-License-Identifier: Apache-2.0
"""The serving bench asks both servers for the same and counts what came as the field counts it.

That its client understands our server is in `tests/with_serve`.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs import _load_servers as servers
from jobs._load_client import Endpoint, closed_loop, open_loop
from jobs._load_run import Loads
from jobs._load_samples import Answer, Events, Sample, Slo, arrivals, percentiles_ms, summary
from jobs.bench_serving import Bench, ratios, table
from serve.config import read
from sg4v_ray.core.errors import ConfigError, Sg4vError

SLO = Slo(ttft_ms=100, tpot_ms=10, e2e_ms=1000)


def chunk(text: str | None = None, **more: Any) -> bytes:
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    event = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **more}
    return f"data: {json.dumps(event)}\n\n".encode()


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":241,"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def heard(*pieces: tuple[float, bytes], end_s: float = 1.0) -> Sample:
    answer = Answer()
    for at_s, data in pieces:
        answer.hear(data, at_s)
    return answer.sample(end_s)


def test_the_first_token_is_the_first_text_and_not_the_role() -> None:
    sample = heard((0.1, chunk()), (0.3, chunk("A")), (0.4, chunk(" cat")), (0.5, USAGE + DONE))
    assert (sample.ttft_s, sample.gaps_s, sample.text) == (0.3, pytest.approx((0.1,)), "A cat")
    assert not sample.error


def test_tokens_are_those_of_the_usage_and_not_the_events() -> None:
    sample = heard((0.1, chunk("A white cat sleeps")), (0.7, USAGE + DONE), end_s=0.7)
    assert (sample.prompt_tokens, sample.completion_tokens) == (241, 7)
    assert sample.tpot_s == pytest.approx(0.1), "six tokens after the first, in 0.6 s"


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n"])
def test_events_are_the_same_however_their_bytes_are_divided(ending: bytes) -> None:
    whole = ending.join(
        [b"data: one", b": a comment", "data: zw\u00f6lf".encode(), b"data: [DONE]", b""]
    )
    for size in range(1, len(whole) + 1):
        events, found = Events(), list[str]()
        for start in range(0, len(whole), size):
            found += events.push(whole[start : start + size])
        assert found == ["one", "zw\u00f6lf", "[DONE]"], size


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        pytest.param([chunk("A"), USAGE], r"without .*\[DONE\]", id="cut off"),
        pytest.param([chunk("A"), DONE], "without .*usage", id="nothing to count"),
        pytest.param([chunk(), USAGE, DONE], "without text", id="no text"),
        pytest.param([chunk("A"), b'data: {"error":{"message":"gone"}}\n\n'], "gone", id="error"),
    ],
)
def test_a_stream_that_is_not_whole_is_a_failure(pieces: Sequence[bytes], error: str) -> None:
    assert re.search(error, heard(*((0.1, one) for one in pieces)).error)


def test_percentiles_are_interpolated() -> None:
    assert percentiles_ms([n / 1000 for n in range(101)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles_ms([0.1, 0.2])["p50"] == 150
    assert percentiles_ms([]) == {}


@pytest.mark.parametrize(
    ("sample", "is_good"),
    [
        pytest.param(Sample(ttft_s=0.1, e2e_s=0.2, completion_tokens=11), True, id="at the limits"),
        pytest.param(Sample(ttft_s=0.11, e2e_s=0.2, completion_tokens=11), False, id="late"),
        pytest.param(Sample(ttft_s=0.1, e2e_s=0.3, completion_tokens=11), False, id="slow"),
        pytest.param(Sample(ttft_s=0.1, e2e_s=1.1, completion_tokens=999), False, id="long"),
        pytest.param(Sample(ttft_s=0.1, e2e_s=0.2, error="503"), False, id="refused"),
    ],
)
def test_a_good_request_keeps_every_limit(sample: Sample, is_good: bool) -> None:
    assert sample.keeps(SLO) is is_good


def test_failed_requests_lower_goodput_and_no_percentile() -> None:
    good = Sample(ttft_s=0.05, e2e_s=0.1, completion_tokens=20)
    found = summary([good, good, good, Sample(error="503")], 2.0, SLO)
    assert (found["goodput_share"], found["goodput_requests_per_s"]) == (0.75, 1.5)
    assert (found["failed"], found["requests_per_s"], found["tokens_per_s"]) == (1, 1.5, 30)
    assert found["ttft_ms"]["p99"] == 50


def test_arrivals_are_a_poisson_process_and_the_same_each_time() -> None:
    due_s = arrivals(5.0, 2000.0, seed=0)
    assert due_s == sorted(due_s) == arrivals(5.0, 2000.0, seed=0)
    assert due_s[-1] < 2000
    gaps = np.diff(due_s)
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert np.std(gaps) == pytest.approx(0.2, rel=0.05), "as spread as they are long"


def test_clients_of_the_closed_loop_have_one_request_each() -> None:
    open_now, most = 0, 0

    async def ask(data: bytes, due_s: float) -> Sample:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0)
        open_now -= 1
        return Sample(text=data.decode())

    bodies = [str(number).encode() for number in range(20)]
    found = asyncio.run(closed_loop(ask, bodies, clients=4))
    assert most == 4
    assert [one.text for one in found] == [str(number) for number in range(20)]


def test_the_open_loop_waits_for_no_answer() -> None:
    async def run() -> list[Sample]:
        all_are_open, waiting = asyncio.Event(), 0

        async def ask(data: bytes, due_s: float) -> Sample:
            nonlocal waiting
            waiting += 1
            if waiting == 3:
                all_are_open.set()
            await asyncio.wait_for(all_are_open.wait(), 10)
            return Sample(text=data.decode())

        return await open_loop(ask, [b"a", b"b", b"c"], [0.0, 0.001, 0.002])

    assert [one.text for one in asyncio.run(run())] == ["a", "b", "c"]


def test_the_bare_server_gets_the_settings_of_our_engine(tmp_path: Path) -> None:
    flags = servers.bare_flags(tmp_path / "model", 8000)
    assert f"--model={tmp_path / 'model'}" in flags
    engine = servers.ENGINE
    for flag in (
        f"--max-num-seqs={engine.capacity}",
        f"--max-model-len={engine.max_model_len}",
        f"--dtype={engine.dtype}",
        "--enforce-eager",
        "--enable-prefix-caching",
        "--mm-processor-cache-gb=0",
        '--limit-mm-per-prompt={"image": 2}',
    ):
        assert flag in flags


def test_our_server_can_read_its_config(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(servers.config(tmp_path, 8123, threads=1)))
    (model,) = read({"config": str(file)}).models
    assert (model.engine, model.id) == (servers.ENGINE, servers.MODEL_ID)


def test_servers_that_count_other_tokens_are_not_compared(tmp_path: Path) -> None:
    photo = tmp_path / "a.jpg"
    photo.write_bytes(b"jpeg")
    sides = [servers.Side(Endpoint(name=name, url="", model="m")) for name in ("ours", "bare")]

    async def run() -> None:
        loads = Loads(sides, [photo] * 2, SLO)
        loads.asks |= {"ours": asking(241), "bare": asking(245)}
        await loads.single(2)

    with pytest.raises(Sg4vError, match=r"\(241, 8\), \(245, 8\)"):
        asyncio.run(run())


def asking(prompt_tokens: int) -> Any:
    async def ask(data: bytes, due_s: float) -> Sample:
        tokens = json.loads(data)["max_tokens"]
        return Sample(prompt_tokens=prompt_tokens, completion_tokens=tokens)

    return ask


def test_ratios_are_medians_over_passes_and_pairs() -> None:
    rates = {"ours": (9.0, 50.0, 8.0), "bare": (10.0, 10.0, 10.0)}
    loads = [
        {"load": "closed", "server": name, "tokens_per_s": rate}
        for name, found in rates.items()
        for rate in found
    ]
    loads.append({"load": "open", "server": "ours", "tokens_per_s": 1.0})
    single = {
        "ours": [Sample(ttft_s=one) for one in (0.110, 0.220, 0.930)],
        "bare": [Sample(ttft_s=one) for one in (0.100, 0.200, 0.300)],
    }
    assert ratios(loads, single) == {"throughput_over_bare": 0.9, "ttft_p50_extra_ms": 20.0}
    assert "closed" in table(loads)


@pytest.mark.parametrize(
    "wrong", [{"clients": 0}, {"rate": -1.0}, {"seconds": 0.001}, {"bare_url": "http://a"}]
)
def test_a_bench_that_cannot_be_is_refused_before_any_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Bench(**wrong)
