# SPDX-License-Identifier: Apache-2.0
"""Looking at a place leaves it as it was; only writing makes folders."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError

from sg4v_ray.core.errors import StorageError
from sg4v_ray.core.storage import Storage


def test_looking_into_a_folder_that_is_not_there_does_not_make_it(tmp_path: Path) -> None:
    home = Storage(str(tmp_path / "typo"))
    assert not home.exists("manifest.json")
    assert list(home.list()) == list(home.list("rows")) == []
    with pytest.raises(StorageError, match="no such object"):
        home.get("manifest.json")
    home.delete("rows")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("root", ["local", "s3://sg4v-test/place"])
@pytest.mark.usefixtures("s3")
def test_an_object_and_a_prefix_are_deleted_and_nothing_beside_them(
    tmp_path: Path, root: str
) -> None:
    home = Storage(root if "://" in root else str(tmp_path / root))
    names = ["a/1", "a/2", "ab", "c"]
    for name in names:
        home.put(name, b"x")
    home.delete("c")
    assert sorted(home.list()) == ["a/1", "a/2", "ab"]
    home.delete("a")
    assert list(home.list()) == ["ab"]
    home.delete("a")
    home.delete_objects(["ab", "never"])
    assert list(home.list()) == []


@pytest.mark.parametrize("root", ["local", "s3://sg4v-test/create"])
@pytest.mark.usefixtures("s3")
def test_the_second_writer_of_an_object_loses(tmp_path: Path, root: str) -> None:
    home = Storage(root if "://" in root else str(tmp_path / root))
    assert home.create("a/part", b"first")
    assert not home.create("a/part", b"second")
    assert home.get("a/part") == b"first"
    assert list(home.list()) == ["a/part"]


@pytest.mark.parametrize("error", [AlreadyExistsError, GenericError])
@pytest.mark.usefixtures("s3")
def test_an_object_that_was_accepted_without_an_answer_is_the_writers_own(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    put = obstore.put

    def accept_and_lose_the_answer(*args: Any, **options: Any) -> None:
        put(*args, **options)
        raise error("a retry of the client found its own object, or the connection was cut")

    home = Storage("s3://sg4v-test/lost")
    monkeypatch.setattr(obstore, "put", accept_and_lose_the_answer)
    assert home.create("part", b"mine")
    monkeypatch.setattr(obstore, "put", put)
    assert not home.create("part", b"of another")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat at once."""
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)


def failing_put(errors: list[Exception], then: Callable[..., Any]) -> Callable[..., Any]:
    """Return a put that raises these errors, and then does its work."""

    def put(*args: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return then(*args, **options)

    return put


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(GenericError("connection reset"), id="dropped connection"),
        pytest.param(AlreadyExistsError("409 Conflict"), id="another write in progress"),
    ],
)
@pytest.mark.usefixtures("s3", "no_pauses")
def test_a_create_that_left_no_object_is_repeated(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    home = Storage("s3://sg4v-test/repeated")
    monkeypatch.setattr(obstore, "put", failing_put([error, error], obstore.put))
    assert home.create("part", b"mine")
    assert home.get("part") == b"mine"


@pytest.mark.usefixtures("s3", "no_pauses")
def test_a_store_that_fails_each_time_ends_a_create_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = Storage("s3://sg4v-test/away")
    errors: list[Exception] = [GenericError("the store is away\n\nDebug source: ...")] * 6
    monkeypatch.setattr(obstore, "put", failing_put(errors, obstore.put))
    with pytest.raises(StorageError, match=r"in 6 tries: the store is away\. Run the job again"):
        home.create("part", b"mine")


@pytest.mark.usefixtures("s3")
def test_a_refusal_for_good_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [PermissionDeniedError("403")]
    monkeypatch.setattr(obstore, "put", failing_put(errors, obstore.put))
    with pytest.raises(PermissionDeniedError):
        Storage("s3://sg4v-test/denied").create("part", b"mine")


def test_a_kill_inside_a_local_create_leaves_no_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Storage(str(tmp_path))

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", killed)
    with pytest.raises(KeyboardInterrupt):
        home.create("part", b"mine")
    monkeypatch.undo()
    assert list(home.list()) == []
    assert home.create("part", b"mine")


def test_a_file_system_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(StorageError, match=r"refuses hard links .* use a root on another file"):
        Storage(str(tmp_path)).create("part", b"mine")


@pytest.mark.parametrize("root", ["local", "s3://sg4v-test/tail"])
@pytest.mark.usefixtures("s3")
def test_a_range_of_an_object_is_read_alone(tmp_path: Path, root: str) -> None:
    home = Storage(root if "://" in root else str(tmp_path / root))
    home.put("a", b"0123456789")
    assert home.get_range("a", 7, 10) == b"789"
    assert home.get_range("a", 0, 10) == b"0123456789"
    assert home.size_bytes("a") == 10
    assert home.sizes() == {"a": 10}
    home.put("sub/b", b"1")
    assert home.list_folder() == ["a"]
    with pytest.raises(StorageError, match="no such object"):
        home.get_range("none", 0, 3)
