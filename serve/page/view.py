# SPDX-License-Identifier: Apache-2.0
"""The HTML of the page that is ours. All text in it is escaped.

Gradio's own chat takes HTML in an answer for HTML, images of other hosts included, whatever it is
told about Markdown; so the conversation is written here.
"""

import base64
import json
from collections.abc import Sequence
from io import BytesIO
from typing import Final
from urllib.parse import quote

from serve.page.captions import Captioned
from serve.page.client import Spoken
from serve.page.sessions import Shown
from sg4v_ray.core.html import Markup, data_uri, element
from sg4v_ray.core.images import ImageLimits, Rejected, open_image

_THUMBNAIL: Final = 112
"""Pixels, shown at half of that."""
STOPPED: Final = "stopped"
_HELLO: Final = (
    "Type your API key to begin. It goes with each question to the server, and is kept in this tab "
    "alone."
)
_EMPTY: Final = "Paste or drop an image below and ask about it, or just ask."


def hello(*, needs_key: bool) -> str:
    """Return what stands on the page before it is connected."""
    return element("p", _HELLO if needs_key else "Connecting", class_="hint")


def notice(words: str) -> str:
    """Return what went wrong, as it stands above the tabs."""
    return element("p", words, class_="notice", role="alert")


def spent(last: Spoken, seconds: float, first_s: float | None) -> str:
    """Return what an answer took, as it stands below it."""
    said = [f"{last.num_tokens} tokens" if last.num_tokens is not None else STOPPED]
    said.append(f"{seconds:.1f} s")
    if first_s is not None:
        said.append(f"first word after {first_s:.2f} s")
    if last.finish_reason == "length":
        said.append("cut off: as many tokens as the model may make")
    return " \u00b7 ".join(said)


def talk(conversation: Sequence[Shown]) -> str:
    """Return a conversation."""
    parts = [part for one in conversation for part in _exchange(one)]
    empty = [] if parts else [element("p", _EMPTY, class_="empty")]
    return element("div", *parts, *empty, class_="talk", role="log", aria_live="polite")


def _exchange(one: Shown) -> list[Markup]:
    asked = [element("p", one.question)] if one.question else []
    if one.file:
        address = f"gradio_api/file={quote(one.file)}"  # of an upload, at the page's own server
        asked.insert(0, element("img", src=address, alt="the image that was asked about"))
    answer = element("p", one.answer, class_="answer" if one.note else "answer grows")
    note = [element("p", one.note, class_="note")] if one.note else []
    return [element("div", *asked, class_="asked"), answer, *note]


def thumbnail(data: bytes, limits: ImageLimits) -> str | None:
    """Return a small picture of an upload as a data: URI; None for what is no image."""
    image = open_image(data, limits)
    if isinstance(image, Rejected):
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small = BytesIO()
    image.save(small, "JPEG", quality=80)
    return data_uri(small.getvalue(), "image/jpeg")


def table(done: Sequence[tuple[Captioned, str | None]], *, total: int) -> str:
    """Return the captions made so far with their thumbnails, and a link that saves them."""
    head = element(
        "tr", *(element("th", one) for one in ("", "File", "Caption", "Tokens", "Flags"))
    )
    rows = [_row(one, small) for one, small in done]
    body = element("table", element("thead", head), element("tbody", *rows))
    return element("div", _summary([one for one, _ in done], total), body, class_="captions")


def _summary(done: Sequence[Captioned], total: int) -> Markup:
    words = f"{len(done)} of {total} images"
    if failed := sum(one.caption is None for one in done):
        words += f", {failed} without a caption"
    saved = json.dumps([one.record() for one in done], ensure_ascii=False, indent=1).encode()
    address = f"data:application/json;base64,{base64.b64encode(saved).decode()}"
    link = element("a", "Download JSON", href=address, download="captions.json")
    return element("p", element("span", words), link)


def _row(one: Captioned, small: str | None) -> Markup:
    picture = element("img", src=small, alt="") if small else Markup("")
    first = [element("td", picture), element("td", one.file.name, class_="file")]
    if one.caption is None:
        return element("tr", *first, element("td", one.error, class_="error", colspan=3))
    return element(
        "tr",
        *first,
        element("td", one.caption.text, class_="said"),
        element("td", str(one.caption.num_tokens), class_="tokens"),
        element("td", ", ".join(one.caption.flags)),
    )
