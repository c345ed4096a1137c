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
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import IO, Final

from openai.types import Batch

from sg4v_ray.captions.batch_answers import BatchAnswers
from sg4v_ray.captions.batch_api import PATH, BatchApi, BatchRefused
from sg4v_ray.captions.charges import Ask
from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.ledger import Sent
from sg4v_ray.captions.teacher import Endpoint, Teacher, body_of
from sg4v_ray.core.errors import (
    ConfigError,
    ContractError,
    Sg4vError,
    TeacherBusy,
    TeacherUnusable,
)

_log = logging.getLogger(__name__)

_ENDED: Final = ("completed", "failed", "expired", "cancelled")
_QUEUE_IS_FULL: Final = "token_limit_exceeded"
_FULL: Final = 5
"""So often in a row a batch may find the queue full of others' batches."""
_PROBES: Final = 3
"""Under a cap so many requests go out alone first: a batch reserves by what they really cost."""


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
    give_up: bool = False
    """Charge batches of earlier runs that cannot be reached in full, and ask their images again."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_bytes", "max_open"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.poll_s <= 0:
            raise ConfigError(f"poll_s must be above 0, got {self.poll_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchCounts:
    """How far the requests are that were put into batches by this run, or taken up by it."""

    requests: int
    answered: int
    """Noted here, or answered at the provider as it says."""
    new: int
    """Of these, what was not there when it was put."""
    batches: int
    """That have not ended."""


class Batches:
    """The batches of one desk; for its event loop."""

    def __init__(
        self, desk: Desk, teacher: Teacher, endpoint: Endpoint, limits: BatchLimits
    ) -> None:
        self._desk, self._teacher = desk, teacher
        self._api = BatchApi(teacher, endpoint, poll_s=limits.poll_s)
        self._answers = BatchAnswers(desk, teacher)
        self._endpoint, self._limits, self._ledger = endpoint, limits, desk.ledger
        self._file: IO[bytes] = _spool()
        self._size = 0
        self._notes: list[Sent] = []
        self._put: set[str] = set()
        """All asks that came, answered ones too."""
        self._done: dict[str, int] = {}
        """How many requests of a batch under way the provider has answered."""
        self._under_way: dict[str, str] = {}
        """Our name and the provider's of batches that have not ended."""
        self._ended: defaultdict[str, set[str]] = defaultdict(set)
        """The provider's names of batches that never ran, by ours."""
        self._full: Counter[str] = Counter()
        self._probes = self._known = 0
        self._url = endpoint.base_url.rstrip("/")
        self._not_yet: dict[str, str] = {}
        """Our name and the input file of batches that found the provider's queue full."""

    async def resume(self) -> None:
        """Take up the batches of this collection's earlier jobs.

        Raises:
            ConfigError: one is at another URL.
            TeacherBusy, TeacherUnusable: the provider does not say.
        """
        mine = [one for one in self._ledger.open.values() if one.job == self._desk.job]
        names = {one.batch for one in mine if one.batch is not None}
        known = {name: found for name, found in self._ledger.batches.items() if found[0]}
        unknown = names - set(known)
        theirs = await self._api.find(unknown) if unknown else {}
        if never := unknown - set(theirs):
            await self._api.delete_uploads(never)
        for name in names:
            provider_id, url = known.get(name, (theirs.get(name), self._url))
            if provider_id is None:
                _log.info("batch %s was never created; its requests cost nothing", name)
                await self._answers.free(name)
            elif url != self._url:
                why = f"are in a batch at {url}, not at {self._url}: give --endpoint.base-url {url}"
                await self._give_up(name, why, ConfigError)
            else:
                self._under_way[name] = provider_id
                for note in self._answers.of(name):
                    self._answers.keys.add(note.key)
                    self._desk.purse.reserve(note.usd)
        self._put |= self._answers.keys

    def counts(self) -> BatchCounts:
        """Return how far the batches are."""
        noted = sum(key in self._ledger.answers for key in self._put)
        told = sum(self._done.get(name, 0) for name in self._under_way)
        return BatchCounts(
            requests=len(self._put),
            answered=noted + told,
            new=noted + told - self._known,
            batches=len(self._under_way) + len(self._not_yet),
        )

    async def add(self, ask: Ask) -> None:
        """Put an ask into the next batch, unless it is answered or in one; may send a full one.

        Raises:
            MoneySpent: it could pass the cap, and no batch under way will give money back.
        """
        keys = self._desk.keys(ask)
        answers, in_batches = self._ledger.answers, self._answers.keys
        # A request that an earlier release noted has that release's key.
        key = next((one for one in keys if one in answers or one in in_batches), keys[0])
        self._put.difference_update(keys)
        self._put.add(key)
        self._known += key in answers
        if key in answers or key in in_batches:
            return
        self._desk.refuse_what_others_ask(keys, ask.row)
        if self._desk.purse.cap_usd is not None and self._probes < _PROBES:
            self._probes += 1
            await self._desk.ask(ask)
            return
        charges = self._desk.charges
        ticket = uuid.uuid4().hex
        most = charges.bounds(ask)
        sent = charges.sent(ticket, key, self._desk.job, ask, most, in_batch=True)
        body = body_of(self._teacher.config, ask.prompt.text, ask.image)
        request = {"custom_id": ticket, "method": "POST", "url": PATH, "body": body}
        line = json.dumps(request).encode() + b"\n"
        if len(line) > self._limits.max_bytes:
            return  # too large for any batch: it is asked alone
        full = len(self._notes) == self._limits.max_requests
        if full or self._size + len(line) > self._limits.max_bytes:
            await self._submit()
        while not self._desk.purse.may(sent.usd):
            await self._submit()
            if not self._under_way and not self._not_yet:
                raise self._desk.money_spent(sent.usd)
            await self._wait_for_one()
        self._desk.purse.reserve(sent.usd)
        self._answers.keys.add(key)
        self._notes.append(sent)
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
        notes = [replace(one, batch=name) for one in self._notes]
        self._notes, self._size, self._file = [], 0, _spool()
        await self._ledger.sent_together(notes)
        try:
            await self._create(name, await self._api.upload(name, file))
        except BatchRefused:
            await self._answers.free(name)
            raise
        finally:
            file.close()
        self._desk.counts.sent += len(notes)
        _log.info("batch %s: %d requests", name, len(notes))

    async def _create(self, name: str, file_id: str) -> None:
        ended = self._ended[name]
        provider_id = await self._api.create(name, file_id, self._ledger.check, ended=ended)
        self._under_way[name] = provider_id
        await self._ledger.batch(name, provider_id, self._url)

    async def _give_up(self, name: str, why: str, error: type[Sg4vError]) -> None:
        """Charge a batch that cannot be read from here in full, if that is allowed."""
        if not self._limits.give_up:
            left = self._answers.of(name)
            raise error(
                f"{len(left)} requests {why}; or give --batch.give-up: then "
                f"${sum(one.usd for one in left):.4f} are charged for them and they are asked again"
            )
        await self._answers.lose(name, why)

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
                if batch is not None and batch.request_counts is not None:
                    self._done[name] = batch.request_counts.completed or 0
                if batch is None:
                    del self._under_way[name]
                    why = "are in a batch that this key does not see: give the key of its project"
                    await self._give_up(name, why, TeacherUnusable)
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
            await self._wait_for_room(name, batch, errors[0].message or "")
            return
        answered, odd = 0, list[Sg4vError]()
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None and (lines := await self._api.lines(file_id)) is not None:
                taken = await self._answers.take(name, lines)
                answered, odd = answered + taken.answered, odd + taken.odd
        counts = batch.request_counts
        unread = any(isinstance(one, ContractError) for one in odd)
        if unread or (counts is not None and answered < (counts.completed or 0)):
            await self._answers.lose(name, "the provider has no readable answer to it")
        await self._answers.free(name)
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

    async def _wait_for_room(self, name: str, batch: Batch, said: str) -> None:
        """Note that a batch found the provider's queue full; it is created anew later.

        Raises:
            TeacherUnusable: again and again, and none of ours is in that queue.
        """
        _log.info("batch %s: the provider's queue is full, it is tried again", name)
        self._ended[name].add(batch.id)
        await self._ledger.batch(name, "", self._url)  # its next one may not be noted in time
        self._full[name] = 0 if self._under_way else self._full[name] + 1
        if self._full[name] < _FULL:
            self._not_yet[name] = batch.input_file_id
            return
        size = len(self._answers.of(name))
        waiting = {**self._not_yet, name: batch.input_file_id}
        self._not_yet.clear()
        for one, file_id in waiting.items():
            await self._answers.free(one)
            await self._api.delete(file_id)
        raise TeacherUnusable(
            self._teacher.clean(
                f"{self._endpoint.base_url} has no room for a batch of {size} requests, though "
                f"none of this job is in its queue: {said} Give a smaller "
                "--batch.max-requests, or run again when other batches have ended"
            )
        )


def _spool() -> IO[bytes]:
    return tempfile.TemporaryFile("w+b")
