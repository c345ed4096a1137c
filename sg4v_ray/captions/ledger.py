# SPDX-License-Identifier: Apache-2.0
"""What was sent to a paid teacher and what came back, on storage before it counts.

A request is noted before it goes out and its answer before anybody sees it, so that a killed job
knows what it has, what it owes, and what it may have paid for without getting it. Notes are JSON
lines in objects that are written once, a few a second: appending does not exist in buckets.

    sent   ticket, key, row, job, usd (the most it can cost), batch, asked, bounds of its usage
    paid   ticket, usd, reply       closes `sent`; the reply is kept for ever, by key
    free   ticket                   closes `sent`: turned away, nothing charged
    lost   ticket, why              closes `sent`: no answer, the most is charged
    batch  batch, provider_id, url  a batch that the provider at a URL knows
"""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sg4v_ray.captions.teacher import Reply
from sg4v_ray.core.errors import ArtifactCorrupt, Sg4vError
from sg4v_ray.core.lease import refuse_overtaken
from sg4v_ray.core.map_ahead import map_ahead
from sg4v_ray.core.retry import RetryPolicy, retrying
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage

_log = logging.getLogger(__name__)

_NOTES: Final = "notes"
_PAUSE_S: Final = 0.2
"""Least time between two writes; what comes in meanwhile is written together."""
_MANY_OBJECTS: Final = 500
"""So many are written into one when the ledger is opened."""
_PATIENCE: Final = RetryPolicy(max_tries=8, first_delay_s=0.5, max_delay_s=30.0)
KILLED: Final = "its job ended"


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that is on its way, or was when its job ended."""

    ticket: str
    key: str
    row: str
    job: str
    """The artifact that it is for, `name@version`."""
    usd: float
    """The most that it can cost."""
    batch: str | None = None
    asked: str = ""
    """The question and its parameters, without the image: `captions.teacher.asked_key`."""
    table_usd: float = 0.0
    """The most that it can cost by the price table alone."""
    least_prompt_tokens: float = 1.0
    """A usage of fewer prompt tokens is not believed."""


@dataclass(frozen=True, slots=True)
class Paid:
    """An answer and what it cost."""

    ticket: str
    row: str
    job: str
    usd: float
    reply: Reply
    asked: str = ""


@dataclass(frozen=True, slots=True)
class Lost:
    """A request without an answer, charged in full."""

    ticket: str
    key: str
    row: str
    job: str
    usd: float
    why: str
    at: str


class Ledger:
    """The notes of one root, written by one job at a time; for one event loop."""

    def __init__(self, home: Storage, *, writer: int | None) -> None:
        """Read all notes of earlier jobs.

        Args:
            home: the ledger's folder, whose lease is held by a writer.
            writer: the number of that lease; when a newer one exists nothing more is sent. None
                for who only reads.

        Raises:
            ArtifactCorrupt: a note is no note.
        """
        self.answers: dict[str, Paid] = {}
        """By answer key."""
        self.open: dict[str, Sent] = {}
        """By ticket: no answer yet."""
        self.lost: list[Lost] = []
        self.batches: dict[str, tuple[str, str]] = {}
        """What the provider calls each batch, and its URL."""
        self.spent_usd: defaultdict[str, float] = defaultdict(float)
        """What each artifact has cost, lost answers in full."""
        self._home, self._notes, self._lease_number = home, home.sub(_NOTES), writer
        self._written = 0
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._closed: set[str] = set()
        self._lost_tickets: set[str] = set()
        self._charged: dict[str, float] = {}
        names = list(self._notes.list())
        for name, data in _read_all(self._notes, names):
            for number, line in enumerate(data.removesuffix("\n").split("\n"), start=1):
                self._take(line, where=f"{self._notes.uri(name)}, line {number}")
        if writer is not None and len(names) >= _MANY_OBJECTS:
            self._merge(names)

    async def sent(self, note: Sent) -> None:
        """Note a request that goes out next.

        Raises:
            LeaseLost: another job writes this ledger now, so the request must not go out.
        """
        await self._write({"event": "sent", **asdict(note)})
        self.open[note.ticket] = note

    async def sent_together(self, notes: list[Sent]) -> None:
        """Note the requests of one batch that is created next; raises as `sent`."""
        await asyncio.gather(*(self.sent(note) for note in notes))

    async def paid(self, ticket: str, usd: float, reply: Reply) -> Paid:
        """Note an answer; from here on it is never asked for again."""
        note = {"event": "paid", "ticket": ticket, "usd": usd, "reply": asdict(reply)}
        sent = self.open[ticket]
        note |= {"key": sent.key, "row": sent.row, "job": sent.job, "asked": sent.asked}
        await self._write(note)
        return self._answer(note)

    async def free(self, ticket: str) -> None:
        """Note a request that was not taken."""
        await self._write({"event": "free", "ticket": ticket})
        self._close(ticket)

    async def lose(self, ticket: str, why: str) -> None:
        """Note a request without an answer."""
        note = {"event": "lost", **asdict(self._lost(self.open[ticket], why))}
        await self._write(note)
        self._lose(note)

    async def batch(self, batch: str, provider_id: str, url: str) -> None:
        """Note what the provider calls a batch."""
        note = {"event": "batch", "batch": batch, "provider_id": provider_id, "url": url}
        await self._write(note)
        self.batches[batch] = (provider_id, url)

    async def check(self) -> None:
        """Raise LeaseLost if another job writes this ledger."""
        await asyncio.to_thread(refuse_overtaken, self._home, self._writer)

    async def lose_what_was_on_its_way(self) -> list[Lost]:
        """Close the single requests of jobs that ended before their answers came."""
        left = [one for one in self.open.values() if one.batch is None]
        await asyncio.gather(*(self.lose(one.ticket, KILLED) for one in left))
        tickets = {one.ticket for one in left}
        return [one for one in self.lost if one.ticket in tickets]

    def _take(self, line: str, *, where: str) -> None:
        try:
            note = json.loads(line)
            match note["event"]:
                case "sent":
                    fields = {key: note[key] for key in Sent.__dataclass_fields__ if key in note}
                    if note["ticket"] not in self._closed:
                        self.open[note["ticket"]] = Sent(**fields)
                case "paid":
                    self._answer(note)
                case "free":
                    self._close(note["ticket"])
                case "lost":
                    self._lose(note)
                case "batch":
                    self.batches[note["batch"]] = (note["provider_id"], note["url"])
                case other:
                    raise KeyError(f"no event {other!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactCorrupt(
                f"{where} is no note of a ledger ({error}). Restore the file from a copy; without "
                "it the job would pay again for what it noted"
            ) from error

    def _answer(self, note: dict[str, Any]) -> Paid:
        reply = Reply(**note["reply"])
        paid = Paid(
            note["ticket"], note["row"], note["job"], note["usd"], reply, note.get("asked", "")
        )
        self.answers.setdefault(note["key"], paid)
        self._charge(paid.ticket, paid.job, paid.usd)
        return paid

    def _lose(self, note: dict[str, Any]) -> None:
        """A request that a later job took for lost stays lost, though its answer came after all:
        the later job has asked again.
        """
        if note["ticket"] not in self._lost_tickets:
            self._lost_tickets.add(note["ticket"])
            self.lost.append(Lost(**{key: note[key] for key in Lost.__dataclass_fields__}))
            self._charge(note["ticket"], note["job"], note["usd"])

    def _charge(self, ticket: str, job: str, usd: float) -> None:
        """Charge a ticket once: the most of what its notes say, in whatever order they are read."""
        before = self._charged.get(ticket, 0.0)
        self._charged[ticket] = max(before, usd)
        self.spent_usd[job] += self._charged[ticket] - before
        self._close(ticket)

    def _close(self, ticket: str) -> None:
        self.open.pop(ticket, None)
        self._closed.add(ticket)

    def _lost(self, sent: Sent, why: str) -> Lost:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Lost(sent.ticket, sent.key, sent.row, sent.job, sent.usd, why, now)

    async def _write(self, note: dict[str, Any]) -> None:
        """Return when a note lies on storage."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((json.dumps(note), done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        await done

    async def _write_waiting(self) -> None:
        while self._waiting:
            notes, self._waiting = self._waiting, []
            self._written += 1
            data = "".join(f"{line}\n" for line, _ in notes).encode()
            try:
                await retrying(
                    lambda data=data: asyncio.to_thread(self._put, data),  # type: ignore[misc]
                    on=STORAGE_ERRORS,
                    policy=_PATIENCE,
                )
            except (*STORAGE_ERRORS, Sg4vError) as error:
                _fail(notes, error)
                continue
            for _, done in notes:
                if not done.done():
                    done.set_result(None)
            await asyncio.sleep(_PAUSE_S)

    @property
    def _writer(self) -> int:
        if self._lease_number is None:
            raise AssertionError("a ledger that was opened to be read is written")
        return self._lease_number

    def _put(self, data: bytes) -> None:
        name = f"{self._writer:06d}-{self._written:08d}.jsonl"
        self._notes.put(name, data, sync=True)
        # After the write: a new writer's claim is older than its reading, so either it has read
        # this note or we see its claim here.
        refuse_overtaken(self._home, self._writer)

    def _merge(self, names: list[str]) -> None:
        """Write all notes into one object; a kill in between leaves some twice, which is fine."""
        merged = b"".join(data.encode() for _, data in _read_all(self._notes, names))
        self._notes.put(f"{self._writer:06d}-00000000.jsonl", merged, sync=True)
        refuse_overtaken(self._home, self._writer)
        self._notes.delete_objects(names)


def _fail(notes: Iterable[tuple[str, "asyncio.Future[None]"]], error: BaseException) -> None:
    for _, done in notes:
        if not done.done():
            done.set_exception(error)


def _read_all(notes: Storage, names: list[str]) -> Iterable[tuple[str, str]]:
    """Read objects many at once: a bucket answers each after some time."""
    texts = map_ahead(notes.get, names, threads=32, ahead=256)
    return zip(names, (one.decode() for one in texts), strict=True)
