# SPDX-License-Identifier: Apache-2.0
"""Why a row has no caption, and how many such rows a job accepts."""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sg4v_ray.core.errors import ConfigError, TooManyRejects

_FIRST_ROWS: Final = 1000
_MOST_OF_THEM: Final = 0.5
_WORTH_ENDING: Final = 1000
"""With fewer rows left a job continues: complete rows are more useful than an early end."""
_NAMED: Final = 5


class Reject(StrEnum):
    """The reasons that are stored in rows. The value is what users see and filter by."""

    # the bytes
    MISSING = "missing"
    NOT_READABLE = "not_readable"
    EMPTY_FILE = "empty_file"
    TOO_MANY_BYTES = "too_many_bytes"
    HOST_NOT_ALLOWED = "host_not_allowed"
    HTTP_ERROR = "http_error"
    TIMED_OUT = "timed_out"
    # the image
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"
    TOO_MANY_PIXELS = "too_many_pixels"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    # the answer
    EMPTY_TEXT = "empty_text"
    CUT_OFF = "cut_off"
    TOO_SHORT = "too_short"
    REPEATS = "repeats"
    REFUSED = "refused"
    PROMPT_ECHO = "prompt_echo"
    WRONG_LANGUAGE = "wrong_language"
    SPECIAL_TOKEN = "special_token"  # noqa: S105
    CONTENT_FILTER = "content_filter"
    BAD_REQUEST = "bad_request"
    NO_ANSWER = "no_answer"
    CRASHES_ENGINE = "crashes_engine"
    ENGINE_ERROR = "engine_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectBudget:
    """How many rejected rows a job accepts before it fails."""

    max_reject_rate: float = 0.02
    """Share of all rows, 0 to 1. Ours: COCO, LCS and SAM have far fewer broken files."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_reject_rate <= 1:
            raise ConfigError(
                f"max_reject_rate must be between 0 and 1, got {self.max_reject_rate}"
            )

    def check(self, *, rejected: Counter[str], total: int) -> None:
        """Raise TooManyRejects when more than the allowed share was rejected.

        Args:
            rejected: how many rows were rejected for each reason.
            total: all rows.
        """
        if total and rejected.total() / total > self.max_reject_rate:
            raise self._spent(rejected, total, "rows were rejected")

    def foresee(
        self, *, rejected: Counter[str], done: int, left: int, total: int
    ) -> TooManyRejects | None:
        """Return the error that a running job will end with, before the rest is paid for.

        That is certain once the rejects are too many for all rows, and likely when more than half
        of at least a thousand rows are rejects.

        Args:
            rejected: how many rows were rejected so far for each reason.
            done: rows so far.
            left: rows to come.
            total: all rows.
        """
        count = rejected.total()
        if left < _WORTH_ENDING:
            return None
        if count > self.max_reject_rate * total:
            return self._spent(rejected, total, "rows were rejected already")
        if done >= _FIRST_ROWS and count > done * max(_MOST_OF_THEM, self.max_reject_rate):
            return self._spent(rejected, done, "rows so far were rejected")
        return None

    def _spent(self, rejected: Counter[str], total: int, what: str) -> TooManyRejects:
        count = rejected.total()
        common = rejected.most_common(_NAMED)
        reasons = ", ".join(f"{number} {reason}" for reason, number in common)
        others = count - sum(number for _, number in common)
        more = f" and {others} for other reasons" if others else ""
        return TooManyRejects(
            f"{count} of {total} {what} ({count / total:.1%}), the budget is "
            f"{self.max_reject_rate:.1%}. Commonest: {reasons}{more}. Read the column "
            "reject_detail in the files below rows/. To accept these rejects, raise "
            "--config.budget.max-reject-rate and run again; committed parts are kept."
        )
