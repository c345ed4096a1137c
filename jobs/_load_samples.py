# SPDX-License-Identifier: Apache-2.0
"""What clients saw of a load, and the figures that follow from it. Nothing here waits or sends.

The words are those of the field. TTFT: until the first text. ITL: between two events with text.
TPOT: what a token took after the first. Goodput: the share of requests within all of some limits.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

_PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What a request must keep to count as good; milliseconds, as load tools write them."""

    ttft_ms: float = 3000.0
    tpot_ms: float = 300.0
    e2e_ms: float = 30_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answered or failed request; seconds since it was due."""

    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    """Between events with text; tokens that come in one event have no gap of their own."""
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server counts: an event may hold any number of them."""
    text: str = ""
    error: str = ""
    """Empty if the answer is complete."""

    @property
    def tpot_s(self) -> float:
        """Seconds of a token after the first."""
        return (self.e2e_s - self.ttft_s) / max(1, self.completion_tokens - 1)

    def keeps(self, slo: Slo) -> bool:
        """Say whether it is complete and within all limits."""
        pairs = (
            (self.ttft_s, slo.ttft_ms),
            (self.tpot_s, slo.tpot_ms),
            (self.e2e_s, slo.e2e_ms),
        )
        return not self.error and all(1000 * seconds <= most for seconds, most in pairs)


class Events:
    """Takes server-sent events apart, however their bytes are divided."""

    def __init__(self) -> None:
        self._tail = b""

    def push(self, data: bytes) -> list[str]:
        """Take bytes; return the data of the events that are whole now."""
        *whole, self._tail = (self._tail + data).replace(b"\r\n", b"\n").split(b"\n\n")
        lines = (one.decode() for one in whole)
        return [one.removeprefix("data:").strip() for one in lines if one.startswith("data:")]


class Answer:
    """One streamed chat completion as a client hears it."""

    def __init__(self) -> None:
        self._events = Events()
        self._heard_s: list[float] = []
        self._texts: list[str] = []
        self._usage: dict[str, int] = {}
        self._error = ""
        self._is_done = False

    def hear(self, data: bytes, at_s: float) -> None:
        """Take bytes of the body that came `at_s` seconds after the request was due."""
        for event in self._events.push(data):
            if event == "[DONE]":
                self._is_done = True
            else:
                self._take(json.loads(event), at_s)

    def _take(self, event: dict[str, Any], at_s: float) -> None:
        if "error" in event:
            self._error = str(event["error"].get("message", "an error without a message"))
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                self._heard_s.append(at_s)
                self._texts.append(text)

    def sample(self, at_s: float) -> Sample:
        """Return what was heard until the body ended, `at_s` seconds after the request was due."""
        error = self._error
        if not error and not (self._is_done and self._usage and self._heard_s):
            error = "the stream ended without text, usage and [DONE]"
        heard = self._heard_s or [at_s]
        return Sample(
            ttft_s=heard[0],
            gaps_s=tuple(float(gap) for gap in np.diff(heard)),
            e2e_s=at_s,
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            completion_tokens=self._usage.get("completion_tokens", 0),
            text="".join(self._texts),
            error=error,
        )


def arrivals(rate: float, seconds: float, *, seed: int) -> list[float]:
    """Return when requests of a Poisson process are due, in seconds from its start."""

    def drawn() -> Iterator[float]:
        draw, at_s = random.Random(seed), 0.0
        while (at_s := at_s + draw.expovariate(rate)) < seconds:
            yield at_s

    return list(drawn())


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return P50, P95 and P99 in milliseconds, interpolated; nothing of no values."""
    if not seconds:
        return {}
    found = np.percentile(seconds, _PERCENTILES)
    return {
        f"p{n}": round(1000 * float(one), 1) for n, one in zip(_PERCENTILES, found, strict=True)
    }


def summary(samples: Sequence[Sample], seconds: float, slo: Slo) -> dict[str, Any]:
    """Return the figures of a load that took some seconds, from the first request to the last."""
    done = [one for one in samples if not one.error]
    good = sum(one.keeps(slo) for one in samples)
    return {
        "requests": len(samples),
        "failed": len(samples) - len(done),
        "seconds": round(seconds, 2),
        "requests_per_s": round(len(done) / seconds, 3),
        "tokens_per_s": round(sum(one.completion_tokens for one in done) / seconds, 2),
        "goodput_share": round(good / len(samples), 4),
        "goodput_requests_per_s": round(good / seconds, 3),
        "ttft_ms": percentiles_ms([one.ttft_s for one in done]),
        "itl_ms": percentiles_ms([gap for one in done for gap in one.gaps_s]),
        "tpot_ms": percentiles_ms([one.tpot_s for one in done]),
        "e2e_ms": percentiles_ms([one.e2e_s for one in done]),
    }
