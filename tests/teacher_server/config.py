# SPDX-License-Identifier: Apache-2.0
"""What the provider does: its key, its prices, its limits, and how often it fails in which way."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ERRORS: Final = (
    *("400", "401", "429", "429_date", "429_ms", "429_bare", "429_quota", "500"),
    *("503", "503_retry_after"),
)
"""Answered with an error status. Nothing is generated, so nothing is billed.

`429` and `503_retry_after` say Retry-After in seconds, `429_date` as an HTTP date, `429_ms` as
`retry-after-ms`; `429_bare` and `503` say nothing; `429_quota` is an empty account.
"""
BROKEN: Final = ("timeout", "drop_before", "drop_after", "malformed")
"""The caption does not arrive. All but `drop_before` are billed."""
ANSWERS: Final = (
    *("refusal", "refusal_prose", "content_filter", "length"),
    *("usage_missing", "usage_zero", "usage_negative", "usage_small", "usage_total"),
)
"""A well-formed body that says something else than a caption, or lies about its size; billed."""
OUTCOMES: Final = ("ok", *ERRORS, *BROKEN, *ANSWERS)
UNBILLED: Final = frozenset((*ERRORS, "drop_before"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Always:
    """A rule that beats chance: what becomes of one image, or of all."""

    outcome: str
    image_sha: str | None = None
    """Hex SHA-256 of the JPEG; None is every image."""
    tries: int | None = None
    """The rule holds for so many first requests of an image; None is for ever."""

    def __post_init__(self) -> None:
        _check_outcome(self.outcome)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """What becomes of one batch; the fields combine."""

    expire: float | None = None
    """Share of the lines that are done when the window closes; None is in time."""
    partial: float = 0.0
    """Share of the lines that get an error status, unbilled."""
    statuses: tuple[str, ...] = ("400", "500")
    """Errors of those lines, in turn."""
    shuffle: bool = False
    """Results come in another order than the lines."""
    fail: str | None = None
    """Error code that validation fails with, e.g. `invalid_json_line`."""
    odd_line: bool = False
    """The first line of the results is cut off."""
    odd_counts: bool = False
    """`request_counts` is an empty object, as of some that only look compatible."""
    no_money: bool = False
    """Its creation is refused: the account is empty."""
    drop_create: bool = False
    """The batch is created, but the connection is closed before the answer."""
    in_progress_s: float | None = None
    """Instead of the config's."""

    def __post_init__(self) -> None:
        for name in self.statuses:
            if name not in ERRORS:
                raise ValueError(f"{name!r} is no error; known: {', '.join(ERRORS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """One provider. Limits that are None are not enforced."""

    key: str = "sk-test"
    model: str = "gpt-4o"
    seed: int = 0
    """Draws the faults; captions depend on image and prompt only."""

    usd_per_million_input: float = 2.5
    usd_per_million_output: float = 10.0
    batch_discount: float = 0.5
    """What a line of a batch costs, as a share of the same request online."""

    caption_tokens: float = 220.0
    """Median of a caption's length in tokens, which are words here."""
    caption_sigma: float = 0.25
    """Spread of the logarithm of that length."""
    latency_s: float = 0.0
    random_latency_s: float = 0.0
    """Up to so much is added, even over the range."""

    faults: dict[str, float] = field(default_factory=dict)
    """Probability of each outcome but `ok`, per request; equal for equal seed, image and try."""
    always: tuple[Always, ...] = ()
    """The first rule that fits decides."""
    refuse_unless_prompt_sha: str | None = None
    """Hex SHA-256 of the one text that is never refused."""
    refuse_unless_share: float = 1.0
    """Share of the images that are refused with any other text."""
    refuse_unless_outcome: str = "refusal"
    echo_key: bool = False
    """Errors repeat the key that the client sent, as careless proxies do."""
    retry_after_s: int = 1
    """What errors say in Retry-After; whole seconds."""

    requests_per_window: int | None = None
    tokens_per_window: int | None = None
    count_max_tokens: bool = False
    """Count `max_tokens` instead of what the answer will have, as OpenAI does at the door."""
    window_s: float = 60.0
    max_concurrent: int | None = None

    batch_plans: tuple[BatchPlan | None, ...] = ()
    """By order of creation; None and all later ones go well."""
    has_batch_api: bool = True
    batch_validating_s: float = 0.2
    batch_in_progress_s: float = 0.2
    """The lines are done evenly over this time."""
    batch_finalizing_s: float = 0.2
    max_batch_requests: int = 50_000
    max_file_bytes: int = 200 * 10**6
    max_enqueued_requests: int | None = None
    """Lines of all batches under way; OpenAI counts their tokens."""

    def __post_init__(self) -> None:
        for name in (*self.faults, self.refuse_unless_outcome):
            _check_outcome(name)
        if sum(self.faults.values()) > 1 + 1e-9 or min(self.faults.values(), default=0) < 0:
            raise ValueError(f"probabilities of faults must be within one: {self.faults}")


def _check_outcome(name: str) -> None:
    if name not in OUTCOMES:
        raise ValueError(f"unknown outcome {name!r}; known: {', '.join(OUTCOMES)}")


def load(path: Path) -> ServerConfig:
    """Read a config file; unknown fields are a TypeError."""
    fields: dict[str, Any] = json.loads(path.read_text())
    fields["always"] = tuple(Always(**rule) for rule in fields.get("always", ()))
    plans = fields.get("batch_plans", ())
    fields["batch_plans"] = tuple(plan and BatchPlan(**plan) for plan in plans)
    return ServerConfig(**fields)


def save(config: ServerConfig, path: Path) -> None:
    """Write what `load` reads."""
    path.write_text(json.dumps(asdict(config), indent=1))
