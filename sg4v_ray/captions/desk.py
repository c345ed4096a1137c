# SPDX-License-Identifier: Apache-2.0
"""The one place from which a job asks its teacher: limits, money, and never twice.

A request goes out when a place is free, the cap allows the most that it can cost, its turn has
come, and the ledger has it on storage. Then the answer is stored before anybody sees it. Images
with equal bytes that are asked the same are asked once.
"""

import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NoReturn

from sg4v_ray.captions.charges import Ask, Bounds, Charges
from sg4v_ray.captions.ledger import Ledger, Paid, Sent
from sg4v_ray.captions.teacher import (
    AnswerLost,
    Endpoint,
    Reply,
    Teacher,
    TurnedAway,
    answer_keys,
)
from sg4v_ray.core.errors import (
    ConfigError,
    MoneySpent,
    Sg4vError,
    StorageError,
    TeacherBusy,
    TeacherUnusable,
)
from sg4v_ray.core.price import Purse
from sg4v_ray.core.rate import Throttle
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.retry import RetryPolicy
from sg4v_ray.core.storage import STORAGE_ERRORS

_log = logging.getLogger(__name__)

_RETRY: Final = RetryPolicy(first_delay_s=0.5, max_delay_s=30.0)
_FEW: Final = 8
"""With so many images left, or refused, nothing is concluded from others."""
_LONG_S: Final = 5.0
"""A pause worth a line in the log."""
_STALL_S: Final = 1.0
"""A note that took longer than this was late for its turn."""


class Stopped(Sg4vError):
    """The job is being stopped: what is on its way is waited for, nothing more goes out."""


@dataclass(slots=True)
class Counts:
    """What a desk has done since it opened."""

    sent: int = 0
    known: int = 0
    """Answers that were there already."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Answers by `caption` or reject reason, and requests turned away or lost."""


class Desk:
    """Asks one teacher for one job; for one event loop."""

    def __init__(self, teacher: Teacher, endpoint: Endpoint, ledger: Ledger, *, job: str) -> None:
        self.ledger, self.job, self.counts = ledger, job, Counts()
        self.purse = Purse(endpoint.max_usd, ledger.spent_usd[job])
        self.charges = Charges(endpoint.prices, teacher.config)
        self._teacher, self._endpoint = teacher, endpoint
        self._throttle = Throttle(endpoint.limits)
        self._asking: dict[str, asyncio.Task[Paid | Reply]] = {}
        self._others = {
            one.key: one.job
            for one in ledger.open.values()
            if one.batch is not None and one.job != job
        }
        """Asks that are in batches of other collections."""
        self._free = asyncio.Condition()
        self._open = self._answered = self._refused = 0
        self._ending: Sg4vError | None = None
        self._ends = asyncio.Event()

    def key(self, ask: Ask) -> str:
        """Return the ledger key under which a new answer is stored."""
        return self.keys(ask)[0]

    def keys(self, ask: Ask) -> tuple[str, ...]:
        """Return the ledger keys of an ask: the present one, then those of earlier releases."""
        return answer_keys(
            self._teacher.config,
            prompt_sha256=ask.prompt.sha256,
            image_sha256=ask.image_sha256,
            attempt=ask.attempt,
        )

    def known(self, keys: tuple[str, ...]) -> Paid | None:
        """Return the stored answer under one of the keys of an ask."""
        answers = self.ledger.answers
        return next((answers[one] for one in keys if one in answers), None)

    async def ask(self, ask: Ask) -> Paid | Reply:
        """Return the answer to an ask: the one that is stored, or a new one.

        A Reply that nobody paid for says that this image cannot be answered though others can.

        Raises:
            MoneySpent: the next request could pass the cap; all on their way were waited for.
            TeacherBusy: no image at all was answered through all tries.
            TeacherUnusable: the key, the model or the URL is wrong, or the account is empty.
            ConfigError: a batch of another collection asks the same.
            LeaseLost: another job writes the ledger.
        """
        keys = self.keys(ask)
        if (known := self.known(keys)) is not None:
            self.counts.known += 1
            return known
        self.refuse_what_others_ask(keys, ask.row)
        key = keys[0]
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(self._ask_until_answered(ask, key))
            self._asking[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    def refuse_what_others_ask(self, keys: tuple[str, ...], row: str) -> None:
        """Raise ConfigError if a batch of another collection asks the same, or both are paid."""
        job = next((self._others[one] for one in keys if one in self._others), None)
        if job is not None:
            raise ConfigError(
                f"{row} is asked the same in a batch of {job} that has not ended; finish that "
                f"collection first (the same command with its --out), then this one finds its "
                "answers"
            )

    def _forget(self, key: str, done: "asyncio.Task[Paid | Reply]") -> None:
        del self._asking[key]
        if not done.cancelled():
            done.exception()  # looked at: whoever asked may be gone

    @property
    def on_their_way(self) -> int:
        """Requests that are admitted and not settled."""
        return self._open

    async def stop(self) -> None:
        """Send nothing more and wait for what is on its way."""
        self._end(Stopped("the job is stopped; run it again to go on"))
        async with self._free:
            await self._free.wait_for(lambda: not self._open)

    def _end(self, error: Sg4vError) -> None:
        self._ending = self._ending or error
        self._ends.set()

    async def _ask_until_answered(self, ask: Ask, key: str) -> Paid | Reply:
        """Try until there is an answer, or until it is clear who is to blame that there is none."""
        tries, answered = 0, self._answered
        while True:
            try:
                return await self._ask_once(ask, key)
            except (TurnedAway, AnswerLost) as error:
                why = error
            except Sg4vError as error:
                await self._fail(error)
            is_busy = isinstance(why, TurnedAway) and why.is_busy
            tries += 1
            if tries < self._endpoint.max_tries:
                if not is_busy:  # busy holds everybody
                    await asyncio.sleep(random.uniform(0, _RETRY.bound_s(tries)))
                continue
            others_are_answered = self._answered > answered
            if is_busy and others_are_answered:
                tries, answered = 0, self._answered
            elif others_are_answered or (not is_busy and self._is_one_of_the_last):
                return _unanswered(Reject.NO_ANSWER, f"{tries} tries, the last one: {why}")
            else:
                await self._fail(
                    TeacherBusy(
                        f"{self._endpoint.base_url} answered nothing in {tries} tries "
                        f"(--endpoint.max-tries): {why}. Answers so far are kept; run again later"
                    )
                )

    @property
    def _is_one_of_the_last(self) -> bool:
        """Say whether only a few images are left of a collection that was answered before.

        Then nobody else's answer can tell a bad image from a teacher that is away, in any run.
        """
        return bool(self.ledger.answers) and len(self._asking) <= _FEW

    async def _ask_once(self, ask: Ask, key: str) -> Paid | Reply:
        most = self.charges.bounds(ask)
        sent = self.charges.sent(uuid.uuid4().hex, key, self.job, ask, most)
        usd = sent.usd
        await self._admit(usd)
        spent = 0.0
        try:
            ticket = await self._note(sent, most)
            try:
                reply = await self._send(ask, ticket, most)
            except (TurnedAway, TeacherUnusable):
                await self.ledger.free(ticket)
                raise
            except AnswerLost as error:
                spent = usd
                self.counts.outcomes["lost"] += 1
                _log.warning("%s: no answer, charged in full: %s", ask.row, error)
                await self.ledger.lose(ticket, str(error))
                raise
            if reply.reject == Reject.BAD_REQUEST:
                await self.ledger.free(ticket)  # nothing to keep: the same may be right tomorrow
                self._note_refused(reply)
                return reply
            spent = self.charges.cost(reply, sent)
            return await self.ledger.paid(ticket, spent, reply)
        except STORAGE_ERRORS as error:
            raise StorageError(
                f"the ledger cannot be written ({error}), so nothing more is sent; run again when "
                "its storage is back"
            ) from error
        finally:
            await self._leave(usd, spent)

    def _note_refused(self, reply: Reply) -> None:
        """End this desk when a provider takes no request at all: then no image is to blame.

        Raises:
            TeacherUnusable: so many were refused and none was ever answered.
        """
        self._refused += 1
        if self._refused >= _FEW and not self._answered and not self.ledger.answers:
            raise TeacherUnusable(
                f"{self._endpoint.base_url} refuses every request: {reply.detail}. Check the key, "
                "the model name and what the model takes (--config.teacher...)"
            )

    async def _note(self, sent: Sent, most: Bounds) -> str:
        """Wait for a request's turn and note it, so that it goes out right after."""
        noted = False
        while True:
            try:
                await self._turn(most.tokens)
            except Sg4vError:
                if noted:
                    await self.ledger.free(sent.ticket)
                raise
            if noted:
                return sent.ticket
            began_s = time.monotonic()
            await self.ledger.sent(sent)
            noted = True
            if time.monotonic() - began_s < _STALL_S:
                return sent.ticket
            # Storage stood still: all that waited for it would go out at once.
            self._throttle.settle(most.tokens, 0)

    async def _turn(self, tokens: int) -> None:
        while True:
            await self._sleep_until(self._throttle.book(tokens, time.monotonic()))
            if self._ending is not None:
                self._throttle.settle(tokens, 0)
                raise self._ending
            now = time.monotonic()
            if self._throttle.held(now) <= now:
                return
            # Others were turned away meanwhile: a place in the queue after the pause.
            self._throttle.settle(tokens, 0)

    async def _sleep_until(self, at_s: float) -> None:
        """Sleep, and wake up early when this desk ends."""
        if (seconds := at_s - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ends.wait(), seconds)

    async def _send(self, ask: Ask, ticket: str, most: Bounds) -> Reply:
        """Send one request and tell the throttle what became of it."""
        self.counts.sent += 1
        sent_s, used = time.monotonic(), most.tokens
        try:
            reply = await self._teacher.ask(ask.prompt.text, ask.image, ticket=ticket)
            used = reply.prompt_tokens + reply.completion_tokens
        except TurnedAway as error:
            used = 0
            self.counts.outcomes["turned_away"] += 1
            if error.is_busy:
                self._hold(sent_s, error)
            raise
        finally:
            self._throttle.settle(most.tokens, used)
        self._throttle.answered()
        self._answered += reply.reject != Reject.BAD_REQUEST
        self.counts.outcomes[reply.reject or "caption"] += 1
        return reply

    def _hold(self, sent_s: float, error: TurnedAway) -> None:
        """Hold all requests as the provider asks, and say so when it is long."""
        now = time.monotonic()
        before = self._throttle.held(now)
        self._throttle.turned_away(sent_s, now, error.retry_after_s)
        if (until := self._throttle.held(now)) > before and until - now >= _LONG_S:
            _log.info("nothing is sent for %.0f s: %s", until - now, error)

    async def _admit(self, usd: float) -> None:
        """Wait for a free place and for money; take both.

        Raises whatever ends this desk, once nothing is on its way any more.
        """
        async with self._free:
            while True:
                if not self._open and self._ending is None and not self.purse.may(usd):
                    self._end(self.money_spent(usd))
                if self._ending is not None:
                    await self._free.wait_for(lambda: not self._open)
                    raise self._ending
                if self._open < self._throttle.in_flight and self.purse.may(usd):
                    break
                await self._free.wait()
            self._open += 1
            self.purse.reserve(usd)
            self._free.notify(1)  # a refund may have made room for more than one

    async def _leave(self, reserved_usd: float, spent_usd: float) -> None:
        async with self._free:
            self._open -= 1
            self.purse.settle(reserved_usd, spent_usd)
            if self._ending is not None or not self._open:
                self._free.notify_all()
            else:
                self._free.notify(1)

    async def _fail(self, error: Sg4vError) -> NoReturn:
        """End this desk with an error: wait for what is on its way, then raise."""
        self._end(error)
        async with self._free:
            self._free.notify_all()
            await self._free.wait_for(lambda: not self._open)
        raise error from None

    def money_spent(self, usd: float) -> MoneySpent:
        """Return the error of a job whose next request could pass the cap."""
        return MoneySpent(
            f"stopped at ${self.purse.spent_usd:.4f} of max_usd ${self.purse.cap_usd:g}, all runs "
            f"of {self.job} included: one more request may cost ${usd:.4f}. Answers are kept; run "
            "again with more (--endpoint.max-usd) to go on"
        )


def _unanswered(reject: Reject, why: str) -> Reply:
    return Reply(
        text=None,
        reject=reject.value,
        detail=why,
        finish_reason=None,
        prompt_tokens=0,
        completion_tokens=0,
        usage_is_sound=True,
    )
