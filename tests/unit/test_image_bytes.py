# SPDX-License-Identifier: Apache-2.0
"""A location that leads nowhere costs one row and never the job."""

import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sg4v_ray.core import image_bytes
from sg4v_ray.core.errors import ConfigError, ContractError, StorageError
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.image_bytes import read
from sg4v_ray.core.images import ImageLimits, Rejected
from sg4v_ray.core.location import parse
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.pixels import read_images

LIMITS = ImageLimits()
MISSING, NOT_READABLE = Reject.MISSING, Reject.NOT_READABLE


def reason(text: str) -> Reject:
    found = read(text, limits=LIMITS)
    assert isinstance(found, Rejected), found
    assert found.detail
    return found.reason


@pytest.fixture(autouse=True)
def cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that look right, and a network that is not asked."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("", MISSING, id="no URI in the table"),
        pytest.param("/nowhere/a.jpg", MISSING, id="not there"),
        pytest.param("/etc", MISSING, id="a folder"),
        pytest.param("/dev/zero", MISSING, id="a device"),
        pytest.param("/etc/passwd/a.jpg", NOT_READABLE, id="a folder that is a file"),
        pytest.param("/" + "x" * 300, NOT_READABLE, id="a name too long for the file system"),
        pytest.param("/a\0b.jpg", NOT_READABLE, id="a zero byte"),
        pytest.param("a.jpg", NOT_READABLE, id="relative"),
        pytest.param("ftp://a.org/a.jpg", NOT_READABLE, id="a scheme that is not read"),
        pytest.param("file://host/a.jpg", NOT_READABLE, id="a file of another host"),
        pytest.param("s3:///a.jpg", NOT_READABLE, id="no bucket"),
        pytest.param("s3://bucket", MISSING, id="a bucket and no object"),
        pytest.param("s3://bucket/", MISSING, id="a bucket and an empty name"),
        pytest.param("s3://bucket/a//b.jpg", NOT_READABLE, id="an empty folder name"),
        pytest.param("s3://bucket/../b.jpg", NOT_READABLE, id="out of the bucket"),
        pytest.param("s3://buck et/b.jpg", NOT_READABLE, id="no name of a bucket"),
        pytest.param("tar:1:2", NOT_READABLE, id="half a piece"),
        pytest.param("tar:-5:5:/etc/passwd", NOT_READABLE, id="before the beginning"),
        pytest.param("tar:0:-1:/etc/passwd", NOT_READABLE, id="a length that means all of it"),
        pytest.param("tar:0:10:/dev/zero", MISSING, id="a piece of a device"),
        pytest.param("tar:0:10:tar:0:10:/a", NOT_READABLE, id="a piece of a piece"),
        pytest.param("parquet:0:-1:image:/a.parquet", NOT_READABLE, id="a row before the first"),
    ],
)
def test_a_place_that_cannot_be_read_is_a_reason(text: str, wanted: Reject) -> None:
    assert reason(text) is wanted


def test_a_batch_with_such_a_place_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    uris = ["ftp://a.org/1.jpg", "", str(tmp_path / "a.jpg"), "https://a..example.org/1.jpg"]
    fetch = FetchConfig(allow_hosts=("*",))
    first, second, good, last = read_images(uris, limits=LIMITS, fetch=fetch)
    assert good == b"image"
    for found, wanted in (
        (first, NOT_READABLE),
        (second, MISSING),
        (last, Reject.HTTP_ERROR),
    ):
        assert isinstance(found, Rejected)
        assert found.reason is wanted


def test_a_file_without_a_size_is_read_to_the_limit_only() -> None:
    found = read("/proc/self/environ", limits=ImageLimits(max_bytes=10))
    assert isinstance(found, Rejected)
    assert found.reason is Reject.TOO_MANY_BYTES


def test_a_file_without_a_size_is_read_whole() -> None:
    file = Path("/proc/version")
    assert file.stat().st_size == 0
    assert read(str(file), limits=LIMITS) == file.read_bytes()


def test_a_small_image_takes_no_memory_of_the_size_of_the_limit(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        assert read(str(image), limits=ImageLimits(max_bytes=2**26)) == b"x" * 1000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_a_bucket_that_fails_is_no_damage_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        def seek(self, offset: int, whence: int) -> int:
            return 1000

        def read(self, count: int) -> bytes:
            raise OSError("Generic S3 error: 412 Precondition Failed")

    monkeypatch.setattr(image_bytes.obstore, "open_reader", lambda *_: Reader())
    with pytest.raises(StorageError, match="nothing is lost, run again"):
        read("parquet:0:0:image:s3://bucket/a.parquet", limits=LIMITS)


def test_a_pipe_does_not_hold_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert reason(f"{tmp_path}/pipe") is MISSING
    assert reason(f"tar:0:10:{tmp_path}/pipe") is MISSING


@pytest.mark.parametrize(
    "piece", ["9:0:image", "0:9:image", "0:0:other"], ids=["row group", "row", "column"]
)
def test_a_table_that_was_changed_after_it_was_indexed_gives_reasons(
    tmp_path: Path, piece: str
) -> None:
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "a.parquet")
    assert reason(f"parquet:{piece}:{tmp_path}/a.parquet") is Reject.CORRUPT
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema({"image": pa.binary()})) as stream:
        stream.write_table(pa.table({"image": [b"1"]}))
    assert reason(f"arrow:{piece}:{tmp_path}/a.arrow") is Reject.CORRUPT


@pytest.mark.parametrize(
    "text", ["/a b/ü?#%20.jpg", "s3://b/a%20b/c?d#e.jpg", "https://a.org/?x=1"]
)
def test_strange_letters_of_a_name_stay_as_they_are(text: str) -> None:
    assert str(parse(text)) == text


def test_a_place_that_is_none_names_the_ones_that_are() -> None:
    with pytest.raises(ContractError, match="write an absolute path or an http"):
        parse("images/a.jpg")


def test_a_prefix_that_could_be_read_in_two_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match="rename the prefix"):
        Storage("s3://bucket/my%20images")
