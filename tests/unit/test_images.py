# SPDX-License-Identifier: Apache-2.0
"""What an untrusted image becomes: upright RGB, or a row with a precise reason."""

import resource
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from sg4v_ray.core import images
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.images import ImageLimits, Rejected, open_image
from sg4v_ray.core.rejects import Reject

LIMITS = ImageLimits()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png_header(width: int, height: int) -> bytes:
    """A legal PNG header of any size, with no pixels behind it."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    data = encoded(photo(), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    found = open_image(data[:-2] + scan * 200 + data[-2:], LIMITS)
    assert isinstance(found, Rejected)
    assert "scans, limit 100" in found.detail
    assert not isinstance(open_image(data, LIMITS), Rejected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Reject.EMPTY_FILE, id="no bytes"),
        pytest.param(b"hello, I am a text file", Reject.NOT_AN_IMAGE, id="text named .png"),
        pytest.param(b"<svg xmlns='http://x'/>", Reject.NOT_AN_IMAGE, id="svg"),
        pytest.param(encoded(photo(), "TIFF"), Reject.FORMAT_NOT_ALLOWED, id="tiff"),
        pytest.param(encoded(photo(), "ICO"), Reject.FORMAT_NOT_ALLOWED, id="ico"),
        pytest.param(encoded(photo(), "JPEG")[:-200], Reject.TRUNCATED, id="truncated jpeg"),
        pytest.param(encoded(photo(), "PNG")[:-200], Reject.TRUNCATED, id="truncated png"),
        pytest.param(encoded(photo(), "WEBP")[:-200], Reject.TRUNCATED, id="truncated webp"),
        pytest.param(encoded(photo(), "BMP")[:-200], Reject.TRUNCATED, id="truncated bmp"),
        pytest.param(png_header(60_000, 60_000), Reject.TOO_MANY_PIXELS, id="60,000 x 60,000"),
        pytest.param(png_header(9_000, 9_000), Reject.TOO_MANY_PIXELS, id="below Pillow's own"),
    ],
)
def test_what_cannot_be_shown_has_a_reason(data: bytes, reason: Reject) -> None:
    found = open_image(data, LIMITS)
    assert isinstance(found, Rejected)
    assert found.reason is reason
    assert found.detail


def exif_of(tag: int, kind: int, value: bytes) -> bytes:
    """EXIF data that turn an image, with one more entry that Pillow would not write."""
    turned = struct.pack("<HHII", 0x0112, 3, 1, 6)
    other = struct.pack("<HHI", tag, kind, 4 if kind == 2 else 1) + value
    entries = b"".join(sorted((turned, other), key=lambda one: struct.unpack("<H", one[:2])))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(exif_of(0x011A, 2, b"abc\0"), id="a resolution that is text"),
        pytest.param(exif_of(0x0131, 5, b"\0\0\0\0"), id="a program's name that is a fraction"),
        pytest.param(exif_of(0x8769, 3, b"\xff\xff\0\0"), id="a directory beyond the end"),
    ],
)
def test_strange_exif_data_do_not_cost_an_image(exif: bytes) -> None:
    found = open_image(encoded(photo(), "JPEG", exif=exif), LIMITS)
    assert isinstance(found, Image.Image)
    assert found.size == (30, 40)


def test_damage_inside_a_complete_file_is_corrupt_not_truncated() -> None:
    data = bytearray(encoded(photo(), "PNG"))
    data[60] ^= 0xFF
    found = open_image(bytes(data), LIMITS)
    assert isinstance(found, Rejected)
    assert found.reason is Reject.CORRUPT


def test_details_of_rejects_are_equal_in_each_run_and_printable() -> None:
    details = []
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(40), b"]\xcd\x00text"):
        first, second = (open_image(data, ImageLimits()) for _ in range(2))
        assert isinstance(first, Rejected)
        assert first == second
        details.append(first.detail)
    assert details[0] == "PNG: cannot identify image file"
    assert details[1] == "starts with the bytes 5d cd 00 74 65 78 74"


def test_the_byte_limit_comes_before_everything() -> None:
    found = open_image(b"\xff\xd8\xff" + b"0" * 100, ImageLimits(max_bytes=50))
    assert isinstance(found, Rejected)
    assert found.reason is Reject.TOO_MANY_BYTES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_allowed_formats_become_rgb(kind: str) -> None:
    image = open_image(encoded(photo(), kind), LIMITS)
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (20, 40), "white")
    upright.paste((255, 0, 0), (0, 0, 20, 10))  # a red band at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    data = encoded(upright.rotate(90, expand=True), "JPEG", exif=exif, quality=95)
    image = open_image(data, LIMITS)
    assert isinstance(image, Image.Image)
    assert image.size == (20, 40)
    red, green, _ = image.getpixel((10, 3))
    assert red > 200 and green < 60


def test_cmyk_is_converted() -> None:
    data = encoded(Image.new("RGB", (8, 8), (200, 30, 30)).convert("CMYK"), "JPEG", quality=95)
    image = open_image(data, LIMITS)
    assert isinstance(image, Image.Image)
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() < 12


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(1, 64).repeat(2, axis=0)
    image = open_image(encoded(Image.fromarray(ramp), "PNG"), LIMITS)
    assert isinstance(image, Image.Image)
    assert np.abs(np.asarray(image)[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1


def test_16_bit_grey_with_a_transparent_value_is_scaled_too() -> None:
    grey = Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16))
    image = open_image(encoded(grey, "PNG", transparency=7), LIMITS)
    assert isinstance(image, Image.Image)
    assert image.getpixel((1, 1)) == (117, 117, 117)


def test_palette_keeps_its_colours() -> None:
    data = encoded(Image.new("RGB", (8, 8), (10, 200, 90)).quantize(4), "PNG")
    image = open_image(data, LIMITS)
    assert isinstance(image, Image.Image)
    assert image.getpixel((4, 4)) == (10, 200, 90)


def test_transparency_lies_over_white() -> None:
    see_through = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image = open_image(encoded(see_through, "PNG"), LIMITS)
    assert isinstance(image, Image.Image)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_of_a_gif_the_first_frame_is_taken() -> None:
    first, second = Image.new("RGB", (8, 8), "blue"), Image.new("RGB", (8, 8), "red")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    image = open_image(data, LIMITS)
    assert isinstance(image, Image.Image)
    assert image.getpixel((4, 4)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_what_is_converted_in_strips_is_the_same_image(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(1).integers(0, 65536, (37, 23, 4)).astype(np.uint16)
    if mode == "I;16":
        made = Image.fromarray(noise[:, :, 0])
    else:
        made = Image.fromarray(noise.astype(np.uint8), "RGBA").convert(mode)
    whole = open_image(encoded(made, "PNG"), LIMITS)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 5 * 23)
    strips = open_image(encoded(made, "PNG"), LIMITS)
    assert isinstance(whole, Image.Image) and isinstance(strips, Image.Image)
    assert strips.tobytes() == whole.tobytes()


def _grown_mb(data: bytes) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(open_image(data, LIMITS), Image.Image)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_of_a_large_image_no_more_is_held_than_itself_and_what_comes_of_it(mode: str) -> None:
    data = encoded(Image.new(mode, (5_000, 4_000)), "PNG")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        assert fresh.submit(_grown_mb, data).result() < 1.3 * 2 * 4 * 20


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pixels": 0}, {"max_pixels": 2 * 10**8}])
def test_limits_that_no_image_meets_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        ImageLimits(**limits)
