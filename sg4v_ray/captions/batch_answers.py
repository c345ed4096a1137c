# SPDX-License-Identifier: Apache-2.0
"""What came of the requests of a batch: answers, errors, nothing; into ledger and purse."""

import asyncio
import json
import logging
from typing import Final

from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.ledger import Sent
from sg4v_ray.captions.teacher import AnswerLost, Reply, Teacher, TurnedAway
from sg4v_ray.core.errors import ContractError, Sg4vError, TeacherUnusable
from sg4v_ray.core.rejects import Reject

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 500
"""Answers that are noted together."""


class BatchAnswers:
    """Settles the requests of one desk's batches; for its event loop."""

    def __init__(self, desk: Desk, teacher: Teacher) -> None:
        self._desk, self._teacher, self._ledger = desk, teacher, desk.ledger
        self._taken: set[str] = set()
        self.keys: set[str] = set()
        """Asks that are in a batch, or in the file of the next one."""

    def of(self, name: str) -> list[Sent]:
        """Return the requests of a batch that are not settled."""
        return [one for one in self._ledger.open.values() if one.batch == name]

    async def take(self, name: str, lines: list[str]) -> list[Sg4vError]:
        """Note the answers of a file; return what its odd lines would end the job with."""
        odd: list[Sg4vError] = []
        for start in range(0, len(lines), _AT_ONCE):
            piece = (self._take_line(name, line) for line in lines[start : start + _AT_ONCE])
            odd += [one for one in await asyncio.gather(*piece) if one is not None]
        return odd

    async def _take_line(self, name: str, line: str) -> Sg4vError | None:
        """Note one answer; a line that says none leaves its request to be freed with the batch."""
        try:
            answer = json.loads(line)
            ticket = answer["custom_id"]
            response = answer.get("response") or {}
            status, body = response.get("status_code"), json.dumps(response.get("body"))
            note = self._ledger.open.get(ticket)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return ContractError(
                self._teacher.clean(
                    f"the provider's batch file has an odd line ({error!r}): {line[:200]}. The "
                    "other answers are kept; run again, its image is asked anew"
                )
            )
        if note is None or note.batch != name or ticket in self._taken:
            return None  # another run, or another line, has noted it already
        try:
            if status is None:  # expired, cancelled: never answered
                return None
            reply = (
                self._teacher.reply(body)
                if status == 200
                else self._teacher.status_error(status, {}, body)
            )
        except TurnedAway:
            return None
        except TeacherUnusable as error:
            return error
        except AnswerLost as error:
            self._taken.add(ticket)
            await self._lose_one(note, str(error))
            return None
        self._desk.counts.outcomes[reply.reject or "caption"] += 1
        if reply.reject != Reject.BAD_REQUEST:
            self._taken.add(ticket)
            await self._keep(note, reply)
        return None

    async def _lose_one(self, note: Sent, why: str) -> None:
        self._desk.counts.outcomes["lost"] += 1
        await self._ledger.lose(note.ticket, why)
        self._desk.purse.settle(note.usd, note.usd)

    async def _keep(self, note: Sent, reply: Reply) -> None:
        least = note.least_prompt_tokens
        spent = self._desk.charges.cost(reply, note.usd, least_prompt=least, in_batch=True)
        await self._ledger.paid(note.ticket, spent, reply)
        self._desk.purse.settle(note.usd, spent)

    async def free(self, name: str) -> None:
        """Close the requests of a batch that were not answered: nothing is charged for them."""
        left = self.of(name)
        await asyncio.gather(*(self._ledger.free(one.ticket) for one in left))
        for one in left:
            if one.key in self.keys:
                self.keys.discard(one.key)
                self._desk.purse.settle(one.usd, 0.0)

    async def lose(self, name: str, why: str) -> None:
        """Give up a batch that nobody can read any more: the most is charged, and listed."""
        left = self.of(name)
        _log.warning("%d requests of a batch are charged in full: %s", len(left), why)
        await asyncio.gather(*(self._ledger.lose(one.ticket, why) for one in left))
        for one in left:
            held = one.usd if one.key in self.keys else 0.0
            self.keys.discard(one.key)
            self._desk.purse.settle(held, one.usd)
