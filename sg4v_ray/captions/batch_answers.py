# SPDX-License-Identifier: Apache-2.0
"""What came of the requests of a batch: answers, errors, nothing; into ledger and purse."""

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Final

from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.ledger import Sent
from sg4v_ray.captions.teacher import AnswerLost, Reply, Teacher, TurnedAway
from sg4v_ray.core.errors import ContractError, Sg4vError, TeacherUnusable
from sg4v_ray.core.rejects import Reject

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 500
"""Answers that are noted together."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a file of a batch held."""

    answered: int
    """Lines that were billed."""
    odd: list[Sg4vError]
    """What the job is to end with, once everything is noted."""


class BatchAnswers:
    """Settles the requests of one desk's batches; for its event loop."""

    def __init__(self, desk: Desk, teacher: Teacher) -> None:
        self._desk, self._teacher, self._ledger = desk, teacher, desk.ledger
        self._settled: set[str] = set()
        self.keys: set[str] = set()
        """Asks that are in a batch, or in the file of the next one."""

    def of(self, name: str) -> list[Sent]:
        """Return the requests of a batch that are not settled."""
        return [one for one in self._ledger.open.values() if one.batch == name]

    async def take(self, name: str, lines: list[str]) -> Taken:
        """Note the answers of a file, and free what it says was never answered."""
        found: list[Sg4vError | bool] = []
        for start in range(0, len(lines), _AT_ONCE):
            piece = (self._take_line(name, line) for line in lines[start : start + _AT_ONCE])
            found += await asyncio.gather(*piece)
        odd = [one for one in found if isinstance(one, Sg4vError)]
        return Taken(answered=sum(one is True for one in found), odd=odd)

    async def _take_line(self, name: str, line: str) -> Sg4vError | bool:
        """Note one answer; say whether it is one that was billed, or what is odd about it."""
        try:
            answer = json.loads(line)
            ticket = answer["custom_id"]
            response = answer.get("response") or {}
            status, body = response.get("status_code"), json.dumps(response.get("body"))
            note = self._ledger.open.get(ticket)
            if not isinstance(status, int | None):
                raise TypeError(f"status_code {status!r}")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return ContractError(
                f"the provider's batch file has an odd line ({error!r}): "
                f"{self._teacher.clean(line)[:200]}. The other answers are kept, its request is "
                "charged in full; run again, its image is asked anew"
            )
        billed = status == 200
        if note is None or note.batch != name or ticket in self._settled:
            return billed  # another run, or another line, has noted it already
        self._settled.add(ticket)
        try:
            if status is None:  # expired, cancelled: never answered
                raise TurnedAway("not answered in time")
            reply = (
                self._teacher.reply(body)
                if billed
                else self._teacher.status_error(status, {}, body)
            )
        except TurnedAway:
            await self._free_one(note)
        except TeacherUnusable as error:
            await self._free_one(note)
            return error
        except AnswerLost as error:
            await self._lose_one(note, str(error))
        else:
            self._desk.counts.outcomes[reply.reject or "caption"] += 1
            if reply.reject == Reject.BAD_REQUEST:
                await self._free_one(note)
            else:
                await self._keep(note, reply)
        return billed

    async def _keep(self, note: Sent, reply: Reply) -> None:
        spent = self._desk.charges.cost(reply, note, in_batch=True)
        await self._ledger.paid(note.ticket, spent, reply)
        self._settle(note, spent)

    async def _lose_one(self, note: Sent, why: str) -> None:
        self._desk.counts.outcomes["lost"] += 1
        await self._ledger.lose(note.ticket, why)
        self._settle(note, note.usd)

    async def _free_one(self, note: Sent) -> None:
        await self._ledger.free(note.ticket)
        self._settle(note, 0.0)
        self.keys.discard(note.key)

    def _settle(self, note: Sent, usd: float) -> None:
        held = note.usd if note.key in self.keys else 0.0
        self._desk.purse.settle(held, usd)

    async def free(self, name: str) -> None:
        """Close the requests of a batch that were not answered: nothing is charged for them."""
        await asyncio.gather(*map(self._free_one, self.of(name)))

    async def lose(self, name: str, why: str) -> None:
        """Give up what nobody can read any more: the most is charged, and listed."""
        if left := self.of(name):
            _log.warning("%d requests of a batch are charged in full: %s", len(left), why)
            await asyncio.gather(*(self._lose_one(one, why) for one in left))
