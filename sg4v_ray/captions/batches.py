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
from dataclasses import dataclass, replace
from typing import IO, Final

from openai.types import Batch

from sg4v_ray.captions.batch_answers import BatchAnswers
from sg4v_ray.captions.batch_api import PATH, BatchApi
from sg4v_ray.captions.charges import Ask
from sg4v_ray.captions.desk import Desk
from sg4v_ray.captions.ledger import Sent
from sg4v_ray.captions.teacher import Endpoint, Teacher, body_of
from sg4v_ray.core.errors import (
    ConfigError,
    Sg4vError,
    TeacherBusy,
    TeacherUnusable,
)

_log = logging.getLogger(__name__)

_ENDED: Final = ("completed", "failed", "expired", "cancelled")
_QUEUE_IS_FULL: Final = "token_limit_exceeded"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchCounts:
    """How far the requests are that were put into batches by this run, or taken up by it."""

    requests: int
    answered: int
    """Noted here, or answered at the provider as it says."""
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
        self._not_yet: dict[str, str] = {}
        """Our name and the input file of batches that found the provider's queue full."""

    async def resume(self) -> int:
        """Take up the batches of this collection's earlier jobs; return how many are under way.

        Raises:
            TeacherBusy, TeacherUnusable: the provider does not say.
        """
        mine = [one for one in self._ledger.open.values() if one.job == self._desk.job]
        names = {one.batch for one in mine if one.batch is not None}
        unknown = names - set(self._ledger.batches)
        theirs = await self._api.named() if unknown else {}
        if never := unknown - set(theirs):
            await self._api.delete_uploads(never)
        here = self._endpoint.base_url
        for name in names:
            provider_id, url = self._ledger.batches.get(name, (theirs.get(name), here))
            if provider_id is None:
                _log.info("batch %s was never created; its requests cost nothing", name)
                await self._answers.free(name)
            elif url != here:
                await self._answers.lose(name, f"its batch is at {url}, not at {here}")
            else:
                self._under_way[name] = provider_id
                for note in self._answers.of(name):
                    self._answers.keys.add(note.key)
                    self._desk.purse.reserve(note.usd)
        self._put |= self._answers.keys
        return len(self._under_way)

    def counts(self) -> BatchCounts:
        """Return how far the batches are."""
        noted = sum(key in self._ledger.answers for key in self._put)
        told = sum(self._done.get(name, 0) for name in self._under_way)
        open_batches = len(self._under_way) + len(self._not_yet)
        return BatchCounts(requests=len(self._put), answered=noted + told, batches=open_batches)

    async def add(self, ask: Ask) -> None:
        """Put an ask into the next batch, unless it is answered or in one; may send a full one.

        Raises:
            MoneySpent: it could pass the cap, and no batch under way will give money back.
        """
        key = self._desk.key(ask)
        self._put.add(key)
        if key in self._ledger.answers or key in self._answers.keys:
            return
        charges = self._desk.charges
        most = charges.bounds(ask)
        usd = charges.most_usd(most, in_batch=True)
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
        self._answers.keys.add(key)
        least = most.least_prompt_tokens
        self._notes.append(
            Sent(ticket, key, ask.row, self._desk.job, usd, least_prompt_tokens=least)
        )
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
                if batch is not None and batch.request_counts is not None:
                    self._done[name] = batch.request_counts.completed
                if batch is None:
                    del self._under_way[name]
                    await self._answers.lose(name, "the provider has no such batch any more")
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
                odd += await self._answers.take(name, await self._api.lines(file_id))
        await self._answers.free(name)
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


def _spool() -> IO[bytes]:
    return tempfile.TemporaryFile("w+b")
