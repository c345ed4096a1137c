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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import IO, Final, TypeVar

import openai
from openai.types import Batch, FileObject

from sg4v_ray.captions.desk import Ask, Desk
from sg4v_ray.captions.ledger import Sent
from sg4v_ray.captions.teacher import AnswerLost, Endpoint, Teacher, TurnedAway, body_of
from sg4v_ray.core.errors import ConfigError, ContractError, TeacherBusy, TeacherUnusable
from sg4v_ray.core.retry import RetryPolicy, retrying

_log = logging.getLogger(__name__)
T = TypeVar("T")

_PATH: Final = "/v1/chat/completions"
_NAME: Final = "sg4v_batch"
_ENDED: Final = ("completed", "failed", "expired", "cancelled")
_QUEUE_IS_FULL: Final = "token_limit_exceeded"
_UPLOAD_S: Final = 900.0
_AT_ONCE: Final = 500
"""Answers that are noted together."""
_PATIENCE: Final = RetryPolicy(max_tries=8, first_delay_s=0.5, max_delay_s=60.0)


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
        self._desk, self._teacher, self._client = desk, teacher, teacher.client
        self._endpoint, self._limits, self._ledger = endpoint, limits, desk.ledger
        self._file: IO[bytes] = _spool()
        self._size = 0
        self._notes: list[Sent] = []
        self._keys = {one.key for one in self._ledger.open.values()}
        """Asks that are in a batch or in the file."""
        self._under_way: dict[str, str] = {}
        """Our name and the provider's of batches that have not ended."""

    async def resume(self) -> int:
        """Take up the batches of earlier jobs; return how many are under way.

        Raises:
            TeacherBusy, TeacherUnusable: the provider does not say.
        """
        names = {one.batch for one in self._ledger.open.values() if one.batch is not None}
        if not names:
            return 0
        theirs = await self._named_at_the_provider()
        for name in names:
            provider_id = self._ledger.batches.get(name) or theirs.get(name)
            if provider_id is None:
                _log.info("batch %s was never created; its requests cost nothing", name)
                await self._free(name)
            else:
                self._under_way[name] = provider_id
                for note in self._of(name):
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
        most = self._desk.bounds(ask)
        usd = self._endpoint.prices.usd(most.prompt_tokens, most.completion_tokens, in_batch=True)
        ticket = uuid.uuid4().hex
        body = body_of(self._teacher.config, ask.prompt.text, ask.image)
        request = {"custom_id": ticket, "method": "POST", "url": _PATH, "body": body}
        line = json.dumps(request).encode() + b"\n"
        if len(line) > self._limits.max_bytes:
            return  # too large for any batch: it is asked alone
        full = len(self._notes) == self._limits.max_requests
        if full or self._size + len(line) > self._limits.max_bytes:
            await self._submit()
        while not self._desk.purse.may(usd):
            await self._submit()
            if not self._under_way:
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
        while self._under_way:
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
        uploaded = await self._call(partial(self._upload, name, file))
        file.close()
        self._under_way[name] = await self._create(name, uploaded.id)
        await self._ledger.batch(name, self._under_way[name])
        self._desk.counts.sent += len(notes)
        _log.info("batch %s: %d requests", name, len(notes))

    async def _upload(self, name: str, file: IO[bytes]) -> FileObject:
        file.seek(0)
        return await self._client.files.create(
            file=(f"{name}.jsonl", file), purpose="batch", timeout=_UPLOAD_S
        )

    async def _create(self, name: str, file_id: str) -> str:
        """Create a batch once: where the answer got lost, look whether it was created."""
        tries = 0
        while True:
            try:
                made = await self._client.batches.create(
                    input_file_id=file_id,
                    endpoint=_PATH,
                    completion_window="24h",
                    metadata={_NAME: name},
                )
                return made.id
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError):
                tries += 1
                if tries == _PATIENCE.max_tries:
                    raise TeacherBusy(
                        f"{self._endpoint.base_url} creates no batch; run again later"
                    ) from None
            except openai.APIStatusError as error:
                raise self._unusable(error) from None
            await asyncio.sleep(_PATIENCE.bound_s(tries))
            if (found := (await self._named_at_the_provider()).get(name)) is not None:
                return found

    async def _named_at_the_provider(self) -> dict[str, str]:
        """Return the provider's ids of all our batches by our names."""

        async def pages() -> dict[str, str]:
            return {
                one.metadata[_NAME]: one.id
                async for one in self._client.batches.list(limit=100)
                if one.metadata and _NAME in one.metadata
            }

        return await self._call(pages)

    async def _wait_for_one(self) -> None:
        """Wait until at least one batch has ended, and take its answers."""
        while True:
            ended = False
            for name, provider_id in list(self._under_way.items()):
                batch = await self._call(
                    lambda key=provider_id: self._client.batches.retrieve(key)  # type: ignore[misc]
                )
                if batch.status in _ENDED:
                    await self._take(name, batch)
                    ended = True
            if ended:
                return
            await asyncio.sleep(self._limits.poll_s)

    async def _take(self, name: str, batch: Batch) -> None:
        """Note every answer of a batch that has ended; what has none may be asked again."""
        errors = batch.errors.data if batch.errors and batch.errors.data else []
        refused = [f"{one.code}: {one.message}" for one in errors if one.code != _QUEUE_IS_FULL]
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                await self._take_file(name, file_id)
        await self._free(name)
        del self._under_way[name]
        counts = batch.request_counts
        done = f"{counts.completed} of {counts.total} answered" if counts else "no counts"
        _log.info("batch %s: %s, %s", name, batch.status, done)
        if batch.status == "failed" and refused:
            raise TeacherUnusable(
                self._teacher.clean(
                    f"{self._endpoint.base_url} refused a batch: {'; '.join(refused[:3])}. Nothing "
                    "of it was charged. Correct --batch.max-requests, --batch.max-bytes or the "
                    "model, or run with --mode online"
                )
            )
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                await self._delete(file_id)

    async def _take_file(self, name: str, file_id: str) -> None:
        content = await self._call(lambda: self._client.files.content(file_id))
        lines = [line for line in content.text.split("\n") if line.strip()]
        for start in range(0, len(lines), _AT_ONCE):
            piece = lines[start : start + _AT_ONCE]
            await asyncio.gather(*(self._take_line(name, line) for line in piece))

    async def _take_line(self, name: str, line: str) -> None:
        try:
            answer = json.loads(line)
            note = self._ledger.open.get(answer["custom_id"])
            response = answer.get("response") or {}
            status, body = response.get("status_code"), json.dumps(response.get("body"))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ContractError(
                self._teacher.clean(f"the provider's batch file has an odd line ({error}): {line}")
            ) from None
        if note is None or note.batch != name:
            return  # another run has noted it already
        spent = 0.0
        try:
            if status == 200:
                reply = self._teacher.reply(body)
            elif status is None:  # expired, cancelled: never answered
                return
            else:
                reply = self._teacher.status_error(status, {}, body)
        except TurnedAway:
            return  # freed with the batch
        except AnswerLost as error:
            spent = note.usd
            self._desk.counts.outcomes["lost"] += 1
            await self._ledger.lose(note.ticket, str(error))
        else:
            spent = self._desk.cost(reply, note.usd, in_batch=True)
            self._desk.counts.outcomes[reply.reject or "caption"] += 1
            await self._ledger.paid(note.ticket, spent, reply)
        self._desk.purse.settle(note.usd, spent)

    def _of(self, name: str) -> list[Sent]:
        return [one for one in self._ledger.open.values() if one.batch == name]

    async def _free(self, name: str) -> None:
        """Close the requests of a batch that were not answered: nothing is charged for them."""
        left = self._of(name)
        await asyncio.gather(*(self._ledger.free(one.ticket) for one in left))
        for one in left:
            self._keys.discard(one.key)
            self._desk.purse.settle(one.usd, 0.0)

    async def _delete(self, file_id: str) -> None:
        """Delete a file at the provider; one that stays there is no reason to end a job."""
        try:
            await self._client.files.delete(file_id)
        except openai.APIError as error:
            _log.info("%s stays at the provider: %s", file_id, self._teacher.clean(str(error)))

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call what may be called twice, again while the provider is away or busy."""
        passing = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
        try:
            return await retrying(call, on=passing, policy=_PATIENCE)
        except passing as error:
            said = self._teacher.clean(str(error))
            raise TeacherBusy(
                f"{self._endpoint.base_url} does not answer ({said}); batches under way go on "
                "there: run again later"
            ) from None
        except openai.APIStatusError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: openai.APIStatusError) -> TeacherUnusable:
        said = self._teacher.clean(f"HTTP {error.status_code}: {error.message}")
        return TeacherUnusable(
            f"{self._endpoint.base_url} answered {said}. Check the key, the account and whether it "
            "has a Batch API (--mode online does without)"
        )


def _spool() -> IO[bytes]:
    return tempfile.TemporaryFile("w+b")
