# SPDX-License-Identifier: Apache-2.0
"""Decides what becomes of a request: by rule, by prompt, or by chance that can be repeated."""

import hashlib
from collections import Counter

from tests.teacher_server.config import ANSWERS, ERRORS, ServerConfig
from tests.teacher_server.wire import Ask


class Faults:
    """Counts the tries of every image, and draws their outcomes."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._tries: Counter[str] = Counter()

    def draw(self, ask: Ask) -> str:
        """Return the outcome of the next request for this image."""
        self._tries[ask.image_sha] += 1
        number = self._tries[ask.image_sha]
        return self._by_rule(ask, number) or self._by_prompt(ask) or self._by_chance(ask, number)

    def draw_batched(self, ask: Ask) -> str:
        """Return the outcome of a line of a batch, which has no connection of its own.

        The provider tries again by itself, so errors come by rule only.
        """
        self._tries[ask.image_sha] += 1
        number = self._tries[ask.image_sha]
        certain = self._by_rule(ask, number) or self._by_prompt(ask)
        drawn = certain or self._by_chance(ask, number)
        return drawn if drawn in ANSWERS or (certain and drawn in ERRORS) else "ok"

    def _by_rule(self, ask: Ask, number: int) -> str | None:
        for rule in self._config.always:
            of_this = rule.image_sha in (None, ask.image_sha)
            if of_this and (rule.tries is None or number <= rule.tries):
                return rule.outcome
        return None

    def _by_prompt(self, ask: Ask) -> str | None:
        base, share = self._config.refuse_unless_prompt_sha, self._config.refuse_unless_share
        if base is None or ask.prompt_sha == base or self._even("prompt", ask.image_sha) >= share:
            return None
        return self._config.refuse_unless_outcome

    def _by_chance(self, ask: Ask, number: int) -> str:
        left = self._even("fault", ask.image_sha, str(number))
        for name, probability in self._config.faults.items():
            left -= probability
            if left < 0:
                return name
        return "ok"

    def _even(self, *of: str) -> float:
        """Return a number from 0 to 1 that depends on the seed and on these."""
        digest = hashlib.sha256("/".join((str(self._config.seed), *of)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
