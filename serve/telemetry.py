# SPDX-License-Identifier: Apache-2.0
"""What is told of each request: one line of JSON in the log, and Prometheus figures through Ray.

Never what was asked or answered, and no key: names of keys in the log alone, not in labels.
"""

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, Final, Protocol

from opentelemetry.trace import get_current_span
from ray.util.metrics import Counter, Gauge, Histogram

from serve.visit import CLIENT_CLOSED, Visit
from sg4v_ray.core import observe
from sg4v_ray.core.observe import Metric

_log = logging.getLogger("serve.requests")
_REASONS: Final[Mapping[int, str]] = {
    401: "auth", 403: "auth", 408: "time", 413: "size", 415: "type", 429: "rate", 503: "queue",
    504: "time",
}  # fmt: skip


class Telemetry(Protocol):
    """Hears of every request."""

    def began(self) -> None:
        """A request came."""

    def ended(self, visit: Visit) -> None:
        """It is over, whatever came of it."""


class LogOnly:
    """Writes the lines and counts nothing."""

    def began(self) -> None:
        """Say nothing yet."""

    def ended(self, visit: Visit) -> None:
        """Write the line."""
        _log.info("%s", json.dumps(line(visit)))


class RayTelemetry(LogOnly):
    """Writes the lines and counts with Ray's metrics, in the process that answers HTTP."""

    def __init__(self) -> None:
        self._requests = _counter(observe.SERVE_REQUESTS)
        self._rejected = _counter(observe.SERVE_REJECTED)
        self._cancelled = _counter(observe.SERVE_CANCELLED)
        self._in_flight = Gauge(observe.SERVE_IN_FLIGHT.name, observe.SERVE_IN_FLIGHT.description)
        self._prompt = _counter(observe.SERVE_PROMPT_TOKENS)
        self._made = _counter(observe.SERVE_TOKENS)
        self._images = _counter(observe.SERVE_IMAGES)
        self._ttft = _histogram(observe.SERVE_TTFT_S)
        self._itl = _histogram(observe.SERVE_ITL_S)
        self._e2e = _histogram(observe.SERVE_E2E_S)
        self._queue = _histogram(observe.SERVE_QUEUE_S)
        self._prepare = _histogram(observe.SERVE_PREPARE_S)
        self._open = 0

    def began(self) -> None:
        """Count it as open."""
        self._open += 1
        self._in_flight.set(self._open)

    def ended(self, visit: Visit) -> None:
        """Count what came of it, and write the line."""
        super().ended(visit)
        self._trace(visit)
        self._open -= 1
        self._in_flight.set(self._open)
        status = status_of(visit)
        labels = {"route": visit.route, "model": visit.model, "version": visit.version}
        more = {"status": str(status), "finish_reason": visit.finish_reason or "none"}
        self._requests.inc(1, labels | more)
        if reason := _REASONS.get(status):
            self._rejected.inc(1, {"reason": reason})
        if status == CLIENT_CLOSED:
            self._cancelled.inc(1, labels)
        self._e2e.observe(visit.seconds, labels)
        if visit.model:
            self._count_work(visit, labels)

    def _trace(self, visit: Visit) -> None:
        """Say more on the span that Serve opened, in the words of OpenTelemetry for generation."""
        span = get_current_span()
        if span.is_recording():
            span.set_attributes(
                {
                    "gen_ai.request.model": visit.model,
                    "gen_ai.response.model": visit.version,
                    "gen_ai.usage.input_tokens": visit.prompt_tokens,
                    "gen_ai.usage.output_tokens": visit.made,
                    "http.response.status_code": status_of(visit),
                    "sg4v.request_id": visit.request_id,
                    "sg4v.images": visit.images,
                }
            )

    def _count_work(self, visit: Visit, labels: dict[str, str]) -> None:
        model = {"model": visit.model, "version": visit.version}
        for counter, amount in ((self._prompt, visit.prompt_tokens), (self._made, visit.made)):
            if amount:
                counter.inc(amount, model)
        for source, images in (("url", visit.fetched), ("data", visit.images - visit.fetched)):
            if images > 0:
                self._images.inc(images, {"source": source})
        if visit.prepare_s:
            self._prepare.observe(visit.prepare_s)
        if visit.queue_s is not None:
            self._queue.observe(visit.queue_s, model)
        if visit.first_token_s is not None:
            self._ttft.observe(visit.first_token_s, labels)
        for gap_s in visit.gaps_s:
            self._itl.observe(gap_s, labels)


def _counter(metric: Metric) -> Counter:
    return Counter(metric.name, metric.description, metric.labels)


def _histogram(metric: Metric) -> Histogram:
    return Histogram(metric.name, metric.description, list(metric.buckets_s), metric.labels)


def status_of(visit: Visit) -> int:
    """Return the status that was sent, or 499 if the client did not wait for its end."""
    return visit.status if visit.is_whole else CLIENT_CLOSED


def line(visit: Visit) -> dict[str, Any]:
    """Return what the log says of a request."""
    return {
        "id": visit.request_id,
        "key": visit.key.name if visit.key is not None else None,
        "route": visit.route,
        "model": visit.model or None,
        "version": visit.version or None,
        "status": status_of(visit),
        "finish_reason": visit.finish_reason,
        "images": visit.images,
        "prompt_tokens": visit.prompt_tokens,
        "completion_tokens": visit.made,
        "queue_s": visit.queue_s and round(visit.queue_s, 4),
        "ttft_s": visit.first_token_s and round(visit.first_token_s, 4),
        "e2e_s": round(visit.seconds, 4),
    }


def write_lines() -> None:
    """Let what this server says in this process go to its standard error."""
    server, handler = logging.getLogger("serve"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    server.handlers[:] = [handler]
    server.setLevel(logging.INFO)
    server.propagate = False
