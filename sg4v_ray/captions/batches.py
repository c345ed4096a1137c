# SPDX-License-Identifier: Apache-2.0
"""The teacher's Batch API: answers within a day at half the price, into the same ledger.

    asks -> a file of at most so many requests and bytes -> upload -> create -> poll -> answers

The requests of a batch are in the ledger before it is created, and its name goes along as
metadata: after a kill it is found again at the provider, or it was never created and cost nothing.
"""

import asyncio
import json
import logging
import tempfile
import uuid
from dataclasses import dataclass
from typing import IO, Final

from openai.types import Batch

from sg4v_ray.captions.batch_api import PATH, BatchApi
from sg4v_ray.captions.charges import Ask
from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.ledger import Sent
from sg4v_ray.captions.teacher import AnswerLost, Endpoint, Teacher, TurnedAway, body_of
from sg4v_ray.core.errors import (
    ConfigError,
    ContractError,
    Sg4vError,
    TeacherBusy,
    TeacherUnusable,
)
from sg4v_ray.core.rejects import Reject

_log = logging.getLogger(__name__)

_ENDED: Final = ("completed", "failed", "expired", "cancelled")
_QUEUE_IS_FULL: Final = "token_limit_exceeded"
_AT_ONCE: Final = 500
"""Answers that are noted together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """What a provider takes as one batch.

    Source:
        OpenAI API reference, "Create batch": up to 50,000 requests and 200 MB a file.
    """

    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    max_open: int = 20
    """Batches under way at once: a provider's queue has a limit in tokens."""
    poll_s: float = 60.0
    """How often the provider is asked how far they are."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_bytes", "max_open"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.poll_s <= 0:
            raise ConfigError(f"poll_s must be above 0, got {self.poll_s}")


class Batches:
    """The batches of one desk; for its event loop."""

    def __init__(
        self, desk: Desk, teacher: Teacher, endpoint: Endpoint, limits: BatchLimits
    ) -> None:
        self._desk, self._teacher = desk, teacher
        self._api = BatchApi(teacher, endpoint, poll_s=limits.poll_s)
        self._endpoint, self._limits, self._ledger = endpoint, limits, desk.ledger
        self._file: IO[bytes] = _spool()
        self._size = 0
        self._notes: list[Sent] = []
        self._keys: set[str] = set()
        """Asks that are in a batch or in the file."""
        self._under_way: dict[str, str] = {}
        """Our name and the provider's of batches that have not ended."""
        self._not_yet: dict[str, str] = {}
        """Our name and the input file of batches that found the provider's queue full."""
        self._taken: set[str] = set()

    async def resume(self) -> int:
        """Take up the batches of this collection's earlier jobs; return how many are under way.

        Raises:
            TeacherBusy, TeacherUnusable: the provider does not say.
        """
        mine = [one for one in self._ledger.open.values() if one.job == self._desk.job]
        names = {one.batch for one in mine if one.batch is not None}
        unknown = names - set(self._ledger.batches)
        theirs = await self._api.named() if unknown else {}
        here = self._endpoint.base_url
        for name in names:
            provider_id, url = self._ledger.batches.get(name, (theirs.get(name), here))
            if provider_id is None:
                _log.info("batch %s was never created; its requests cost nothing", name)
                await self._free(name)
            elif url != here:
                await self._lose(name, f"its batch is at {url}, not at {here}")
            else:
                self._under_way[name] = provider_id
                for note in self._of(name):
                    self._keys.add(note.key)
                    self._desk.purse.reserve(note.usd)
        return len(self._under_way)

    async def add(self, ask: Ask) -> None:
        """Put an ask into the next batch, unless it is answered or in one; may send a full one.

        Raises:
            MoneySpent: it could pass the cap, and no batch under way will give money back.
        """
        key = self._desk.key(ask)
        if key in self._ledger.answers or key in self._keys:
            return
        charges = self._desk.charges
        usd = charges.most_usd(charges.bounds(ask), in_batch=True)
        ticket = uuid.uuid4().hex
        body = body_of(self._teacher.config, ask.prompt.text, ask.image)
        request = {"custom_id": ticket, "method": "POST", "url": PATH, "body": body}
        line = json.dumps(request).encode() + b"\n"
        if len(line) > self._limits.max_bytes:
            return  # too large for any batch: it is asked alone
        full = len(self._notes) == self._limits.max_requests
        if full or self._size + len(line) > self._limits.max_bytes:
            await self._submit()
        while not self._desk.purse.may(usd):
            await self._submit()
            if not self._under_way and not self._not_yet:
                raise self._desk.money_spent(usd)
            await self._wait_for_one()
        self._desk.purse.reserve(usd)
        self._keys.add(key)
        self._notes.append(Sent(ticket, key, ask.row, self._desk.job, usd))
        self._file.write(line)
        self._size += len(line)

    async def finish(self) -> None:
        """Send what is left and wait for all batches."""
        await self._submit()
        while self._under_way or self._not_yet:
            await self._wait_for_one()

    async def _submit(self) -> None:
        if not self._notes:
            return
        while len(self._under_way) >= self._limits.max_open:
            await self._wait_for_one()
        name, file = uuid.uuid4().hex, self._file
        notes = [
            Sent(one.ticket, one.key, one.row, one.job, one.usd, batch=name) for one in self._notes
        ]
        self._notes, self._size, self._file = [], 0, _spool()
        await self._ledger.sent_together(notes)
        uploaded = await self._api.upload(name, file)
        file.close()
        await self._create(name, uploaded)
        self._desk.counts.sent += len(notes)
        _log.info("batch %s: %d requests", name, len(notes))

    async def _create(self, name: str, file_id: str) -> None:
        provider_id = await self._api.create(name, file_id, self._ledger.check)
        self._under_way[name] = provider_id
        await self._ledger.batch(name, provider_id, self._endpoint.base_url)

    async def _wait_for_one(self) -> None:
        """Wait until at least one batch has ended, and take its answers.

        A provider that is away for a while is asked again: its batches go on meanwhile.
        """
        while True:
            ended = False
            for name, provider_id in list(self._under_way.items()):
                try:
                    batch = await self._api.look_at(provider_id)
                except TeacherBusy as error:
                    _log.warning("%s", error)
                    continue
                if batch is None:
                    del self._under_way[name]
                    await self._lose(name, "the provider has no such batch any more")
                elif batch.status in _ENDED:
                    await self._take(name, batch)
                ended = ended or name not in self._under_way
            if ended and not self._not_yet:
                return
            _log.info(
                "batches: %d under way, %d wait for room; outcomes so far %s",
                len(self._under_way),
                len(self._not_yet),
                dict(self._desk.counts.outcomes),
            )
            await asyncio.sleep(self._limits.poll_s)
            for name in list(self._not_yet):
                await self._create(name, self._not_yet.pop(name))
            if ended:
                return

    async def _take(self, name: str, batch: Batch) -> None:
        """Note every answer of a batch that has ended; what has none may be asked again."""
        del self._under_way[name]
        errors = batch.errors.data if batch.errors and batch.errors.data else []
        if batch.status == "failed" and {one.code for one in errors} == {_QUEUE_IS_FULL}:
            _log.info("batch %s: the provider's queue is full, it is tried again", name)
            self._not_yet[name] = batch.input_file_id
            return
        odd: list[Sg4vError] = []
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                odd += await self._take_file(name, file_id)
        await self._free(name)
        counts = batch.request_counts
        done = f"{counts.completed} of {counts.total} answered" if counts else "no counts"
        _log.info("batch %s: %s, %s", name, batch.status, done)
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                await self._api.delete(file_id)
        if batch.status == "failed":
            refused = "; ".join(f"{one.code}: {one.message}" for one in errors[:3])
            raise TeacherUnusable(
                self._teacher.clean(
                    f"{self._endpoint.base_url} refused a batch: {refused}. Nothing of it was "
                    "charged. Correct --batch.max-requests, --batch.max-bytes or "
                    "--config.teacher.model, or run with --mode online"
                )
            )
        if odd:
            raise odd[0]

    async def _take_file(self, name: str, file_id: str) -> list[Sg4vError]:
        """Note the answers of a file; return what its odd lines would end the job with."""
        lines = await self._api.lines(file_id)
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
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return ContractError(
                self._teacher.clean(
                    f"the provider's batch file has an odd line ({error!r}): {line[:200]}. The "
                    "other answers are kept; run again, its image is asked anew"
                )
            )
        note = self._ledger.open.get(ticket)
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
            self._desk.counts.outcomes["lost"] += 1
            await self._ledger.lose(ticket, str(error))
            self._desk.purse.settle(note.usd, note.usd)
            return None
        self._desk.counts.outcomes[reply.reject or "caption"] += 1
        if reply.reject != Reject.BAD_REQUEST:
            self._taken.add(ticket)
            spent = self._desk.charges.cost(reply, note.usd, in_batch=True)
            await self._ledger.paid(ticket, spent, reply)
            self._desk.purse.settle(note.usd, spent)
        return None

    def _of(self, name: str) -> list[Sent]:
        return [one for one in self._ledger.open.values() if one.batch == name]

    async def _free(self, name: str) -> None:
        """Close the requests of a batch that were not answered: nothing is charged for them."""
        left = self._of(name)
        await asyncio.gather(*(self._ledger.free(one.ticket) for one in left))
        for one in left:
            self._keys.discard(one.key)
            self._desk.purse.settle(one.usd, 0.0)

    async def _lose(self, name: str, why: str) -> None:
        """Give up a batch that nobody can read any more: the most is charged, and listed."""
        left = self._of(name)
        _log.warning("%d requests of a batch are charged in full: %s", len(left), why)
        await asyncio.gather(*(self._ledger.lose(one.ticket, why) for one in left))
        for one in left:
            held = one.usd if one.key in self._keys else 0.0
            self._keys.discard(one.key)
            self._desk.purse.settle(held, one.usd)


def _spool() -> IO[bytes]:
    return tempfile.TemporaryFile("w+b")
