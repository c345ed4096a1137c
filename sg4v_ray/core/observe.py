# SPDX-License-Identifier: Apache-2.0
"""Metric names with their units, in one table, and the logging set-up of entry points."""

import logging
import sys
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One Prometheus metric. Ray puts `ray_` in front of the name when it exports it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    buckets_s: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in seconds."""


ROWS = Metric("sg4v_rows", "counter", "rows finished, rejected ones included", ("artifact",))
ROWS_REJECTED = Metric("sg4v_rows_rejected", "counter", "rows rejected", ("artifact", "reason"))
TOKENS = Metric("sg4v_generated_tokens", "counter", "tokens generated", ("artifact",))
ENGINE_S = Metric(
    "sg4v_engine_seconds", "counter", "seconds that rows spent in engines, summed", ("artifact",)
)
DECODE_S = Metric("sg4v_decode_seconds", "counter", "CPU worker seconds to read and decode images")
QUEUE = Metric("sg4v_queue", "gauge", "requests that wait inside engines", ("artifact",))
BUSY = Metric("sg4v_engine_busy", "gauge", "share of time that engines work, 0 to 1", ("artifact",))
ACTORS = Metric("sg4v_actors", "gauge", "work actors alive, loading ones included", ("artifact",))
DOLLARS = Metric("sg4v_dollars", "gauge", "dollars spent by all runs", ("artifact",))
TEACHER_OUTCOMES = Metric(
    "sg4v_teacher_outcomes",
    "counter",
    "what became of requests to a teacher",
    ("artifact", "outcome"),
)
TRAIN_LOSS = Metric("sg4v_train_loss", "gauge", "mean loss per labelled token", ("artifact",))
TRAIN_STEP = Metric("sg4v_train_step", "gauge", "optimizer steps done", ("artifact",))
TRAIN_LEARNING_RATE = Metric("sg4v_train_learning_rate", "gauge", "of the last step", ("artifact",))
TRAIN_GRAD_NORM = Metric("sg4v_train_grad_norm", "gauge", "before clipping", ("artifact",))
TRAIN_HELD_OUT_LOSS = Metric(
    "sg4v_train_held_out_loss", "gauge", "of samples that are not trained on", ("artifact",)
)
TRAIN_SAMPLES_PER_S = Metric("sg4v_train_samples_per_s", "gauge", "samples a second", ("artifact",))
TRAIN_TOKENS_PER_S = Metric("sg4v_train_tokens_per_s", "gauge", "tokens a second", ("artifact",))
TRAIN_MFU = Metric("sg4v_train_mfu", "gauge", "model FLOPs utilisation, 0 to 1", ("artifact",))
TRAIN_PADDING_SHARE = Metric(
    "sg4v_train_padding_share", "gauge", "positions without a token, 0 to 1", ("artifact",)
)
TRAIN_DATA_WAIT_SHARE = Metric(
    "sg4v_train_data_wait_share",
    "gauge",
    "time that waits for batches, 0 to 1",
    ("artifact",),
)
TRAIN_MEMORY_GB = Metric(
    "sg4v_train_memory_gb", "gauge", "most that rank 0 held, of GPU or host", ("artifact",)
)
TRAIN_ETA_S = Metric("sg4v_train_eta_seconds", "gauge", "seconds to the end", ("artifact",))
TRAIN_SKIPPED = Metric("sg4v_train_skipped", "gauge", "steps that were not applied", ("artifact",))
TRAIN_ROLLBACKS = Metric(
    "sg4v_train_rollbacks", "gauge", "times that weights went back", ("artifact",)
)
TRAIN_REJECTED = Metric("sg4v_train_rejected", "gauge", "samples that weigh nothing", ("artifact",))

# As vLLM and the OpenAI-compatible servers name them, so that dashboards need no second vocabulary.
_ASKED = ("route", "model", "version")
_BY = ("model", "version")
_SHORT_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0)
SERVE_REQUESTS = Metric(
    "sg4v_serve_requests", "counter", "requests answered", (*_ASKED, "status", "finish_reason")
)
SERVE_REJECTED = Metric(
    "sg4v_serve_requests_rejected", "counter", "requests refused, by reason", ("reason",)
)
SERVE_CANCELLED = Metric(
    "sg4v_serve_requests_cancelled", "counter", "requests whose client went away", _ASKED
)
SERVE_IN_FLIGHT = Metric("sg4v_serve_requests_in_flight", "gauge", "requests that are open")
SERVE_PROMPT_TOKENS = Metric("sg4v_serve_prompt_tokens", "counter", "tokens of prompts", _BY)
SERVE_TOKENS = Metric("sg4v_serve_generation_tokens", "counter", "tokens generated", _BY)
SERVE_IMAGES = Metric("sg4v_serve_images", "counter", "images decoded", ("source",))
SERVE_TTFT_S = Metric(
    "sg4v_serve_time_to_first_token_seconds", "histogram", "from arrival to text", _ASKED, _SHORT_S
)
SERVE_ITL_S = Metric(
    "sg4v_serve_inter_token_latency_seconds", "histogram", "between pieces", _ASKED, _SHORT_S
)
SERVE_E2E_S = Metric(
    "sg4v_serve_e2e_request_latency_seconds", "histogram", "from arrival to end", _ASKED, _LONG_S
)
SERVE_QUEUE_S = Metric(
    "sg4v_serve_request_queue_time_seconds",
    "histogram",
    "from the ingress to a replica; clocks of nodes must agree",
    _BY,
    _SHORT_S,
)
SERVE_PREPARE_S = Metric(
    "sg4v_serve_prepare_seconds", "histogram", "to parse, fetch, decode, tokenise", (), _SHORT_S
)


def set_up_logging(level: int = logging.INFO) -> None:
    """Send our own log lines to stderr. For entry points only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("sg4v_ray")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
