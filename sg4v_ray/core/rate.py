# SPDX-License-Identifier: Apache-2.0
"""How fast somebody may be asked: limits a minute, spent evenly, and what to do when told no.

Pure: every function takes the time, in seconds of any one clock, so that hours can be tested.
"""

from dataclasses import dataclass
from typing import Final

from sg4v_ray.core.errors import ConfigError

_AIM: Final = 0.98
"""Share of a limit that is aimed at: clocks and networks move requests by a little."""
_AIM_OF_TOKENS: Final = 0.975
"""Less, because what is given back moves them too."""
_CREDIT_S: Final = 2.0
"""How long tokens that were given back stay good. More would let a burst through."""
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_FEWER: Final = 0.7


class EvenLimit:
    """An amount a minute, spent evenly: a bucket that holds no more than what is asked for next.

    Source:
        The generic cell rate algorithm (ITU-T I.371) with no tolerance for bursts, except for
        amounts that were booked too high and given back.
    """

    def __init__(self, per_minute: float, *, aim: float = _AIM, credit_s: float = 0.0) -> None:
        """Make a limit; what is given back stays good for `credit_s` seconds."""
        self._per_s, self._credit_s = aim * per_minute / 60, credit_s
        self._free_s = 0.0
        """When the next amount may be spent."""

    def book(self, amount: float, now: float) -> float:
        """Book an amount and return the time, `now` or later, at which it may be spent."""
        at = max(now - self._credit_s, self._free_s)
        self._free_s = at + amount / self._per_s
        return max(now, at)

    def wait_s(self, now: float) -> float:
        """Return how long until anything may be spent; nothing is booked."""
        return max(0.0, self._free_s - now)

    def left(self, now: float) -> float:
        """Return what could be spent at once, now."""
        return max(0.0, now - max(now - self._credit_s, self._free_s)) * self._per_s

    def give_back(self, amount: float) -> None:
        """Take back what was booked and not spent; a negative amount was spent on top."""
        self._free_s -= amount / self._per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a provider allows one account, whatever the number of jobs' processes."""

    requests_per_min: float | None = None
    """None: the provider sets none."""
    tokens_per_min: float | None = None
    """Of prompts and answers together."""
    in_flight: int = 32
    """Requests that are open at once. Fewer while the provider turns requests away."""

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "tokens_per_min"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0 or None, got {value}")
        if self.in_flight < 1:
            raise ConfigError(f"in_flight must be at least 1, got {self.in_flight}")


class Throttle:
    """When the next request may go out, and how many may be open.

    A provider that turns a request away holds all of them: for as long as it says, else for a
    pause that doubles. Each time fewer may be open, and with each answer a few more again.

    Source:
        Additive increase, multiplicative decrease: RFC 5681, section 3.1.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._requests = self._tokens = None
        if limits.requests_per_min is not None:
            self._requests = EvenLimit(limits.requests_per_min)
        if limits.tokens_per_min is not None:
            self._tokens = EvenLimit(limits.tokens_per_min, aim=_AIM_OF_TOKENS, credit_s=_CREDIT_S)
        self._open = float(limits.in_flight)
        self._held_until_s = 0.0
        self._pauses = 0

    @property
    def in_flight(self) -> int:
        """Requests that may be open at once now."""
        return max(1, int(self._open))

    def book(self, tokens: int, now: float) -> float:
        """Book a request of at most so many tokens; return the time at which it may go out."""
        at = max(now, self._held_until_s)
        if self._tokens is not None:
            at = self._tokens.book(tokens, at)
        if self._requests is not None:
            at = self._requests.book(1, at)
        return at

    def held(self, now: float) -> float:
        """Return until when nothing may go out, `now` at the earliest.

        To be asked again right before a request goes out: others were turned away meanwhile.
        """
        return max(now, self._held_until_s)

    def settle(self, booked: int, used: int) -> None:
        """Correct the tokens of a request that was answered."""
        if self._tokens is not None:
            self._tokens.give_back(booked - used)

    def answered(self) -> None:
        """Note an answer: the provider is well."""
        self._pauses = 0
        self._open = min(self._limits.in_flight, self._open + 1 / self._open)

    def turned_away(self, sent_s: float, now: float, retry_after_s: float | None) -> None:
        """Note a request that the provider did not take.

        Args:
            sent_s: when it went out. Of many that were turned away together one counts.
            retry_after_s: how long the provider says to wait.
        """
        if sent_s >= self._held_until_s:
            self._open = max(1.0, self._open * _FEWER)
            self._pauses += 1
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._pauses - 1))
        wait_s = pause_s if retry_after_s is None else retry_after_s
        self._held_until_s = max(self._held_until_s, now + wait_s)
