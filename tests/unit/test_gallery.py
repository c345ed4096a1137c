# SPDX-License-Identifier: Apache-2.0
"""A gallery is one safe file: it loads nothing, escapes everything, and shows every item."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sg4v_ray.analysis.gallery import GalleryItem, render_gallery, write_gallery
from sg4v_ray.core import html
from sg4v_ray.core.html import Markup, element

HOSTILE = "</script><script>alert('x')</script> & \"<img src=x onerror=alert(1)>"


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    data = BytesIO()
    Image.new("RGB", size, "teal").save(data, "PNG")
    return data.getvalue()


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text and source code between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: dict[str, str] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.code[self._open] = self.code.get(self._open, "") + data
        self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def gallery(*items: GalleryItem) -> Reader:
    return Reader(render_gallery(title="captions@v1", figures=[("images", "3")], items=items))


GOOD = GalleryItem(id="a", image=png(), text="A teal square.")
BAD = GalleryItem(id="b", image=None, text=None, reject="truncated", detail="12 bytes missing")


def test_image_and_caption_stand_in_one_card() -> None:
    page = gallery(GOOD)
    [image] = page.all("img")
    assert image["src"] == "data:image/png;base64," + base64.b64encode(png()).decode()
    assert (image["width"], image["height"], image["loading"]) == ("64", "64", "lazy")
    assert "A teal square." in page.texts


def test_a_reject_shows_its_reason_and_its_detail() -> None:
    page = gallery(GOOD, BAD)
    assert page.all("article") == [{}, {"data-reject": "truncated"}]
    assert {"truncated", "12 bytes missing", "no image"} <= set(page.texts)


def test_every_reject_reason_is_a_filter_with_its_count() -> None:
    page = gallery(GOOD, BAD, BAD)
    filters = [one["value"] for one in page.all("input") if one["type"] == "radio"]
    assert filters == ["all", "captions", "reject:truncated"]
    assert re.search(r"All.*?3.*?Captions.*?1.*?truncated.*?2", " ".join(page.texts), re.S)


@pytest.mark.parametrize("field", ["id", "text", "reject", "detail"])
def test_no_field_can_add_an_element(field: str) -> None:
    fields: dict[str, Any] = {"id": "a", "image": None, "text": "t", "reject": "r", "detail": "d"}
    harmless = gallery(GalleryItem(**fields))
    hostile = gallery(GalleryItem(**{**fields, field: HOSTILE}))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert HOSTILE in hostile.texts


def test_title_and_figures_are_escaped_too() -> None:
    page = Reader(render_gallery(title=HOSTILE, figures=[(HOSTILE, HOSTILE)], items=[]))
    assert len(page.all("script")) == 1
    assert page.texts.count(HOSTILE) == 4  # tab, heading, label and value


def test_the_page_may_load_nothing_and_run_only_its_own_script() -> None:
    page = gallery(GOOD)
    [policy] = [
        one["content"]
        for one in page.all("meta")
        if one.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.code[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    addresses = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action")
    ]
    assert all(value and value.startswith("data:") for value in addresses)
    assert "http" not in page.code["style"] + page.code["script"]


def test_small_images_are_enlarged_sharply_and_photographs_are_not() -> None:
    page = gallery(GOOD, GalleryItem(id="p", image=png((640, 480)), text="A photograph."))
    assert [one["class"] for one in page.all("img")] == ["small", ""]


def test_an_empty_gallery_says_so() -> None:
    page = gallery()
    [nothing] = [one for one in page.all("p") if one.get("id") == "nothing"]
    assert "hidden" not in nothing


def test_the_file_is_replaced_whole_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "galleries" / "captions.html"
    for text in ("first", "second"):
        write_gallery(
            path, title=text, figures=[], items=[GalleryItem(id="a", image=None, text=text)]
        )
    assert "second" in path.read_text()
    assert [one.name for one in path.parent.iterdir()] == ["captions.html"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_is_escaped_and_markup_is_not_escaped_twice() -> None:
    inner = element("b", "1 < 2")
    assert inner == "<b>1 &lt; 2</b>"
    assert element("p", inner, "&", class_="x") == '<p class="x"><b>1 &lt; 2</b>&amp;</p>'
    assert isinstance(html.join([inner, "&"]), Markup)


def test_an_attribute_that_is_true_is_bare_and_one_that_is_false_is_absent() -> None:
    assert element("input", checked=True, hidden=False, data_x='"') == (
        '<input checked data-x="&quot;">'
    )
