# SPDX-License-Identifier: Apache-2.0
"""The state of one batch, and the object that clients see of it."""

import time
from dataclasses import dataclass, field
from typing import Any, Final

from tests.teacher_server.account import Account
from tests.teacher_server.config import BatchPlan
from tests.teacher_server.wire import CHAT

_STAMPS: Final = (
    *("in_progress", "finalizing", "completed", "failed"),
    *("expired", "cancelling", "cancelled"),
)
_WINDOW_S: Final = 24 * 3600
_OPEN: Final = ("validating", "in_progress")
UNDER_WAY: Final = ("in_progress", "finalizing", "cancelling")


@dataclass(kw_only=True, slots=True)
class Batch:
    """One batch; whoever changes its status calls `enter`."""

    id: str
    number: int
    """From 0, by order of creation."""
    input_file_id: str
    plan: BatchPlan
    metadata: dict[str, str] | None = None
    status: str = "validating"
    at: dict[str, int] = field(default_factory=lambda: {"created": int(time.time())})
    errors: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    """0 until the input file is checked."""
    completed: int = 0
    failed: int = 0
    """Requests with an error status; those that were not run are neither."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    output: list[bytes] = field(default_factory=list)
    error_output: list[bytes] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def can_be_cancelled(self) -> bool:
        """Whether it has not come to its end."""
        return self.status in _OPEN

    def enter(self, status: str, account: Account) -> None:
        """Go on to another status, and log it."""
        self.status, self.at[status] = status, int(time.time())
        account.write("batch", batch=self.id, status=status, metadata=self.metadata)

    def fields(self) -> dict[str, Any]:
        """Return the batch object."""
        counts = {"total": self.total, "completed": self.completed, "failed": self.failed}
        if self.plan.odd_counts:
            counts = {}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": CHAT,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.at["created"],
            "expires_at": self.at["created"] + _WINDOW_S,
            **{f"{stamp}_at": self.at.get(stamp) for stamp in _STAMPS},
            "request_counts": counts,
            "usage": self._usage(),
            "metadata": self.metadata,
        }

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
