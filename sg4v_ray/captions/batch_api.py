# SPDX-License-Identifier: Apache-2.0
"""Calls of a provider's Batch API: again where that is free, once where a call may cost money."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import IO, Final, TypeVar

import openai
from openai.types import Batch, FileObject

from sg4v_ray.captions.teacher import NO_MONEY, Endpoint, Teacher, retry_after_s
from sg4v_ray.core.errors import TeacherBusy, TeacherUnusable
from sg4v_ray.core.retry import RetryPolicy

_log = logging.getLogger(__name__)
T = TypeVar("T")

PATH: Final = "/v1/chat/completions"
_NAME: Final = "sg4v_batch"
_UPLOAD_S: Final = 900.0
_PATIENCE: Final = RetryPolicy(max_tries=8, first_delay_s=0.5, max_delay_s=60.0)
_PASSING: Final = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
_LOOKS: Final = 3
_LOOK_S: Final = 20.0


class BatchRefused(TeacherUnusable):
    """The provider will have no such batch: nothing was created, nothing costs."""


class BatchApi:
    """One provider's files and batches; errors as `captions.teacher` has them."""

    def __init__(self, teacher: Teacher, endpoint: Endpoint, *, poll_s: float) -> None:
        self._teacher, self._endpoint, self._poll_s = teacher, endpoint, poll_s
        self._client = teacher.client

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """Upload the requests of a batch; return the id of the file."""

        async def send() -> FileObject:
            file.seek(0)
            return await self._client.files.create(
                file=(_file_of(name), file), purpose="batch", timeout=_UPLOAD_S
            )

        try:
            return (await self._call(send)).id
        except TeacherUnusable as error:
            raise BatchRefused(str(error)) from None

    async def delete_uploads(self, names: Collection[str]) -> None:
        """Delete what was uploaded for batches that were never created."""

        async def pages() -> list[str]:
            files = {_file_of(name) for name in names}
            listed = self._client.files.list(purpose="batch", limit=100)
            try:
                return [one.id async for one in listed if one.filename in files]
            except openai.NotFoundError:  # no files, so none to delete
                return []

        for file_id in await self._call(pages):
            await self.delete(file_id)

    async def lines(self, file_id: str) -> list[str] | None:
        """Return the lines of a file that the provider made, or None when it has it no more."""

        async def content() -> str | None:
            try:
                return (await self._client.files.content(file_id)).text
            except openai.NotFoundError:
                return None

        text = await self._call(content)
        return None if text is None else [line for line in text.split("\n") if line.strip()]

    async def create(
        self,
        name: str,
        file_id: str,
        check: Callable[[], Awaitable[None]],
        *,
        ended: Collection[str] = (),
    ) -> str:
        """Create a batch once: where the answer got lost, look whether it was created.

        Args:
            check: raises if another job may take this batch for never created.
            ended: the provider's ids of batches of this name that are of the past.
        """
        tries = 0
        provider_id: str | None = None
        while provider_id is None:
            await check()
            try:
                made = await self._client.batches.create(
                    input_file_id=file_id,
                    endpoint=PATH,
                    completion_window="24h",
                    metadata={_NAME: name},
                )
                provider_id = made.id
            except _PASSING as error:
                if self._is_empty_account(error):
                    raise BatchRefused(str(self._unusable(error))) from None
                tries += 1
                if tries == _PATIENCE.max_tries:
                    raise self._busy(error) from None
                provider_id = (await self.find({name}, ended=ended)).get(name)
            except openai.APIStatusError as error:
                await self.delete(file_id)
                raise BatchRefused(str(self._unusable(error))) from None
        return provider_id

    async def find(self, names: Collection[str], *, ended: Collection[str] = ()) -> dict[str, str]:
        """Return the provider's ids of batches by our names, the newest of each.

        Looks several times: a batch may be listed a while after it was created.
        """
        found = await self._named(names, ended)
        for _ in range(_LOOKS):
            if len(found) == len(names):
                break
            await asyncio.sleep(min(self._poll_s, _LOOK_S))
            found = await self._named(names, ended)
        return found

    async def _named(self, names: Collection[str], ended: Collection[str]) -> dict[str, str]:
        async def pages() -> dict[str, str]:
            found: dict[str, str] = {}
            try:
                async for one in self._client.batches.list(limit=100):  # the newest first
                    name = (one.metadata or {}).get(_NAME)
                    if name is not None and name in names and one.id not in ended:
                        found.setdefault(name, one.id)
            except openai.NotFoundError:  # no Batch API, so no batch
                return {}
            return found

        return await self._call(pages)

    async def look_at(self, provider_id: str) -> Batch | None:
        """Return a batch, or None when the provider has none of that id any more."""

        async def retrieve() -> Batch | None:
            try:
                return await self._client.batches.retrieve(provider_id)
            except openai.NotFoundError:
                return None

        return await self._call(retrieve)

    async def delete(self, file_id: str) -> None:
        """Delete a file at the provider; one that stays there is no reason to end a job."""
        try:
            await self._client.files.delete(file_id)
        except openai.APIError as error:
            _log.info("%s stays at the provider: %s", file_id, self._teacher.clean(str(error)))

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call what may be called twice, again while the provider is away or busy."""
        tries = 0
        while True:
            try:
                return await call()
            except _PASSING as error:
                if self._is_empty_account(error):
                    raise self._unusable(error) from None
                tries += 1
                if tries == _PATIENCE.max_tries:
                    raise self._busy(error) from None
                headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
                asked_s = retry_after_s(headers)
            except openai.APIStatusError as error:
                raise self._unusable(error) from None
            await asyncio.sleep(_PATIENCE.bound_s(tries) if asked_s is None else asked_s)

    def _is_empty_account(self, error: openai.APIError) -> bool:
        return isinstance(error, openai.RateLimitError) and NO_MONEY in error.response.text

    def _busy(self, error: openai.APIError) -> TeacherBusy:
        said = self._teacher.clean(type(error).__name__)
        return TeacherBusy(
            f"{self._endpoint.base_url} does not answer about batches ({said}); those under way go "
            "on there: run again later"
        )

    def _unusable(self, error: openai.APIError) -> TeacherUnusable:
        status = error.status_code if isinstance(error, openai.APIStatusError) else "none"
        said = self._teacher.clean(f"HTTP {status}: {error.message}")
        return TeacherUnusable(
            f"{self._endpoint.base_url} answered {said}. Check the key, the account and whether it "
            "has a Batch API (--mode online does without)"
        )


def _file_of(name: str) -> str:
    return f"{name}.jsonl"
