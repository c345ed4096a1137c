# SPDX-License-Identifier: Apache-2.0
"""Images that are made to hurt are refused before they are decoded."""

import base64
import gzip
import io
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serve.config import Limits
from tests.unit.serve_site import routes_over

pytestmark = pytest.mark.serving

MOST_GROWTH_KB = 200_000


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, bits: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100_000), 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + body + chunk(b"IEND", b"")


def saved(kind: str, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def gif_screen(width: int, height: int) -> bytes:
    return patched(saved("GIF", mode="P"), 6, struct.pack("<HH", width, height))


def bmp(width: int, height: int) -> bytes:
    return patched(saved("BMP"), 18, struct.pack("<ii", width, height))


def jpeg(width: int, height: int) -> bytes:
    data = saved("JPEG")
    place = data.index(b"\xff\xc0")
    return patched(data, place + 5, struct.pack(">HH", height, width))


def bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 50,000 squared": lambda: png(50_000, 50_000),
    "png of 4 billion by 1": lambda: png(2**31 - 1, 1),
    "png of 1 by 4 billion": lambda: png(1, 2**31 - 1),
    "png of no width": lambda: png(0, 10),
    "png of a negative size": lambda: png(2**32 - 1, 2**32 - 1),
    "png of 16 bits": lambda: png(30_000, 30_000, bits=16, colour=6),
    "png with a text bomb": lambda: png(9_000, 9_000, chunk(b"zTXt", b"a\0\0" + bomb(10**8))),
    "png with a profile bomb": lambda: png(9_000, 9_000, chunk(b"iCCP", b"a\0\0" + bomb(10**8))),
    "png whose header lies about its length": lambda: b"\x89PNG\r\n\x1a\n" + b"\xff" * 200,
    "png that ends after its header": lambda: png(100, 100)[:40],
    "gif of 65,535 squared": lambda: gif_screen(65_535, 65_535),
    "gif cut off": lambda: saved("GIF", mode="P")[:20],
    "bmp of 2 billion": lambda: bmp(2**31 - 1, 2**31 - 1),
    "bmp upside down": lambda: bmp(30_000, -30_000),
    "bmp of no size": lambda: bmp(0, 0),
    "jpeg of 65,535 squared": lambda: jpeg(65_535, 65_535),
    "jpeg of no height": lambda: jpeg(100, 0),
    "jpeg cut off": lambda: saved("JPEG", (640, 480))[:300],
    "jpeg of noise": lambda: b"\xff\xd8\xff\xe0" + bytes(range(256)) * 40,
    "webp cut off": lambda: saved("WEBP")[:25],
    "webp of noise": lambda: b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(range(256)) * 8,
    "tiff": lambda: saved("TIFF"),
    "ico": lambda: saved("ICO"),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(a) run\n",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "pdf": lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "photoshop": lambda: b"8BPS\x00\x01" + bytes(60),
    "fits": lambda: b"SIMPLE  =                    T" + b" " * 2850,
    "a gzip bomb": lambda: gzip.compress(bytes(10**8)),
    "a zip": lambda: b"PK\x03\x04" + bytes(100),
    "text": lambda: b"no image at all",
    "one byte": lambda: b"\x89",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[TestClient]:
    with TestClient(routes_over(tiny_model, Limits()).app()) as made:
        yield made


def test_there_are_thirty_of_them() -> None:
    assert len(BOMBS) >= 30


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_400_and_takes_no_memory(client: TestClient, name: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(BOMBS[name]()).decode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = client.post("/v1/captions", json={"images": [uri]})
    assert found.status_code == 400, found.text
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < MOST_GROWTH_KB
    said = found.json()["error"]["message"]
    assert "0x" not in said and "PIL" not in said, "the decoder's own words are not for strangers"
