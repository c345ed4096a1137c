# SPDX-License-Identifier: Apache-2.0
"""What a key used today is known after the process that counted it is gone."""

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from serve import desk
from serve.desk import DeskHandle, QuotaDesk
from serve.keys import Key, Quota
from serve.protocol import ApiError
from serve.quota import Refusal, Ticket
from sg4v_ray.core.storage import Storage

DAY = Quota(tokens_per_day=1000)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "_SAVE_AFTER_S", 0.01)


async def use(books: QuotaDesk, tokens: int) -> None:
    number = secrets.randbits(63)
    assert isinstance(await books.enter("a", DAY, number), Ticket)
    assert await books.book("a", DAY, number, tokens) is None
    await books.leave("a", number, tokens)


async def saved(books: QuotaDesk) -> None:
    assert books._saving is not None
    await books._saving


def run(body: Callable[[], object]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def test_tokens_of_today_outlive_the_process_also_those_of_its_last_request(tmp_path: Path) -> None:
    async def body() -> None:
        books = QuotaDesk(longest_request_s=10, state=str(tmp_path), canaries={})
        for _ in range(4):
            await use(books, 250)
        await saved(books)
        again = QuotaDesk(longest_request_s=10, state=str(tmp_path), canaries={})
        found = await again.enter("a", DAY, 1)
        assert isinstance(found, Refusal) and found.reason == "day"

    run(body)


def test_what_cannot_be_saved_is_tried_again_and_refuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put, failures = Storage.put, iter([True, False])

    def full(self: Storage, path: str, data: bytes, *, sync: bool = False) -> None:
        if next(failures):
            raise OSError("No space left on device")
        put(self, path, data, sync=sync)

    monkeypatch.setattr(Storage, "put", full)

    async def body() -> None:
        books = QuotaDesk(longest_request_s=10, state=str(tmp_path), canaries={})
        await use(books, 100)
        await saved(books)

    run(body)
    assert "is not saved: No space left" in caplog.text
    assert b"100" in Storage(str(tmp_path)).get("usage.json")


def test_without_a_place_to_save_nothing_is_saved() -> None:
    async def body() -> None:
        books = QuotaDesk(longest_request_s=10, state=None, canaries={})
        await use(books, 100)
        assert books._saving is None

    run(body)


@pytest.mark.parametrize("starts_anew", [False, True])
def test_without_its_books_a_key_with_a_quota_gets_503(
    starts_anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_PATIENCE_S", 0.05)

    class Gone:
        def __getattr__(self, name: str) -> "Gone":
            return self

        async def remote(self, *_: object) -> None:
            if starts_anew:  # Serve waits for it
                await asyncio.Event().wait()
            raise ActorDiedError

    key = Key(name="a", sha256="0" * 64, quota=DAY)

    async def body() -> None:
        with pytest.raises(ApiError, match="quotas cannot be looked up") as refused:
            await DeskHandle(Gone()).enter(key, 1)  # type: ignore[arg-type]
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
        await DeskHandle(Gone()).leave(key, 1, 0)  # type: ignore[arg-type]

    run(body)
