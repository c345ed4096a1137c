# SPDX-License-Identifier: Apache-2.0
"""The life of a batch: checked, worked on line by line, written to files; billed at half price."""

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, Final

from tests.teacher_server.account import Account
from tests.teacher_server.answers import completion, error, error_body, generate
from tests.teacher_server.batch import Batch
from tests.teacher_server.batch_lines import BadLine, Line, answered, check, not_run
from tests.teacher_server.config import UNBILLED, ServerConfig
from tests.teacher_server.faults import Faults
from tests.teacher_server.files import Files

_STEPS: Final = 20
"""Parts of the time in progress; a client that looks twice sees the counts go up."""
_LINES_AT_ONCE: Final = 50


class Life:
    """Leads batches from `validating` to their end."""

    def __init__(
        self, config: ServerConfig, files: Files, account: Account, faults: Faults
    ) -> None:
        self._config, self._files, self._account, self._faults = config, files, account, faults

    async def lead(self, batch: Batch, data: bytes, enqueued: Callable[[], int]) -> None:
        """Run one batch; `enqueued` counts the requests of the others under way."""
        lines, errors = await check(data, self._config.max_batch_requests)
        await asyncio.sleep(self._config.batch_validating_s)
        if batch.plan.fail is not None:
            errors = [BadLine(batch.plan.fail, "Failed as planned.").fields(None)]
        if errors := errors or self._too_much(len(lines) + enqueued()):
            batch.errors = errors
            batch.enter("failed", self._account)
            return
        if batch.status == "validating":
            batch.total = len(lines)
            batch.enter("in_progress", self._account)
            await self._work(batch, lines)
        if batch.status == "in_progress":
            batch.enter("finalizing", self._account)
        await asyncio.sleep(self._config.batch_finalizing_s)
        self._store(batch)
        batch.enter(self._end(batch), self._account)

    def _too_much(self, num_requests: int) -> list[dict[str, Any]]:
        limit = self._config.max_enqueued_requests
        if limit is None or num_requests <= limit:
            return []
        message = (
            f"Enqueued token limit reached for {self._config.model} in organization org-tests. "
            f"Limit: {limit} enqueued requests. Please try again once some in_progress batches "
            "have been completed."
        )
        return [BadLine("token_limit_exceeded", message).fields(None)]

    async def _work(self, batch: Batch, lines: list[Line]) -> None:
        plan, rng = batch.plan, random.Random(f"{self._config.seed}/{batch.number}")
        failing = rng.sample(range(len(lines)), round(plan.partial * len(lines)))
        errors = {line: plan.statuses[n % len(plan.statuses)] for n, line in enumerate(failing)}
        order = list(range(len(lines)))
        if plan.shuffle:
            rng.shuffle(order)
        num_in_time = round((1.0 if plan.expire is None else plan.expire) * len(lines))
        num_run = await self._run_in_steps(batch, lines, order[:num_in_time], errors)
        code = "batch_cancelled" if batch.status == "cancelling" else "batch_expired"
        left = (n for n in order[num_run:])
        batch.error_output += [not_run(lines[n], _request_id(batch, n), code) for n in left]

    async def _run_in_steps(
        self, batch: Batch, lines: list[Line], order: list[int], errors: dict[int, str]
    ) -> int:
        """Run lines evenly over the time until all are done or the batch is cancelled."""
        time_s = batch.plan.in_progress_s
        time_s = self._config.batch_in_progress_s if time_s is None else time_s
        per_step = math.ceil(len(order) / _STEPS) or 1
        for num_run in range(len(order)):
            if num_run % per_step == 0:
                await asyncio.sleep(time_s / _STEPS)
            elif num_run % _LINES_AT_ONCE == 0:
                await asyncio.sleep(0)
            if batch.status == "cancelling":
                return num_run
            n = order[num_run]
            self._run(batch, lines[n], _request_id(batch, n), errors.get(n))
        return len(order)

    def _run(self, batch: Batch, line: Line, request_id: str, planned: str | None) -> None:
        """Run one line: log it first, then put it where the client will read it."""
        ask = line.ask
        if ask is None:
            self._fail(batch, line, request_id, "400", line.bad)
            return
        outcome = planned or self._faults.draw_batched(ask)
        if outcome in UNBILLED:
            self._fail(batch, line, request_id, outcome, "")
            return
        made = generate(ask, outcome, self._config)
        usd = self._account.usd(ask.prompt_tokens, made.num_tokens) * self._config.batch_discount
        self._log(batch, line, made.outcome, made.num_tokens, round(usd, 12))
        batch.prompt_tokens += ask.prompt_tokens
        batch.completion_tokens += made.num_tokens
        batch.completed += 1
        body = completion(ask, made, request_id)
        batch.output.append(answered(line, request_id, 200, body))

    def _fail(self, batch: Batch, line: Line, request_id: str, outcome: str, why: str) -> None:
        self._log(batch, line, outcome, None, 0.0)
        batch.failed += 1
        status, _, body = error(outcome, 0)
        body = error_body(why, "invalid_request_error", None) if why else body
        batch.error_output.append(answered(line, request_id, status, body))

    def _log(
        self, batch: Batch, line: Line, outcome: str, num_tokens: int | None, usd: float
    ) -> None:
        ask, billed = line.ask, num_tokens is not None
        self._account.write(
            "batch_line",
            batch=batch.id,
            custom_id=line.custom_id,
            image=ask.image_sha if ask else None,
            prompt=ask.prompt_sha if ask else None,
            outcome=outcome,
            billed=billed,
            prompt_tokens=ask.prompt_tokens if ask and billed else 0,
            completion_tokens=num_tokens or 0,
            usd=usd,
        )

    def _store(self, batch: Batch) -> None:
        """Make files of what there is; a batch without errors has no error file."""
        for kind in ("output", "error"):
            lines = batch.output if kind == "output" else batch.error_output
            if lines:
                if kind == "output" and batch.plan.odd_line:
                    lines[0] = lines[0][:40] + b"\n"
                name = f"{batch.id}_{kind}.jsonl"
                made = self._files.add(name, "batch_output", b"".join(lines))
                setattr(batch, f"{kind}_file_id", made.id)
                lines.clear()

    def _end(self, batch: Batch) -> str:
        if batch.status == "cancelling":
            return "cancelled"
        return "completed" if batch.plan.expire is None else "expired"


def _request_id(batch: Batch, line: int) -> str:
    return f"req_{batch.number:06d}_{line:06d}"
