# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages: they open from disk and load nothing, whatever text is in them.

Every `str` is escaped when it enters an element; only `Markup`, which this module makes, is not.
The page's content security policy names its one style and its one script by hash, so text that
slipped through would still not run.
"""

import base64
import hashlib
import html
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

_VOID = frozenset({"br", "hr", "img", "input", "meta"})


class Markup(str):
    """HTML that is already escaped."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | int | bool) -> Markup:
    """Return one element. A trailing or inner `_` of an attribute name is dropped or made `-`.

    Args:
        name: tag name.
        children: text, which is escaped, or Markup, which is not.
        attributes: True gives a bare attribute, False none at all.
    """
    opening = "".join([name, *(_attribute(key, value) for key, value in attributes.items())])
    if name in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Return children one after the other, escaped where they are not Markup."""
    return Markup("".join(one if isinstance(one, Markup) else html.escape(one) for one in children))


def data_uri(data: bytes, media_type: str) -> str:
    """Return bytes as the value of a `src` attribute."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def figures(values: Sequence[tuple[str, str]]) -> Markup:
    """Return a strip of labelled figures, the page's summary."""
    pairs = [element("div", element("dt", label), element("dd", value)) for label, value in values]
    return element("dl", *pairs, class_="figures")


def page(title: str, body: Markup, *, style: str = "", script: str = "") -> str:
    """Return a whole page.

    Args:
        title: shown in the tab and as the heading.
        body: what stands below the heading.
        style: CSS, added to the style that all pages share.
        script: JavaScript that runs when the page has been read.
    """
    css = _STYLE + style
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(css)}'; script-src " + (f"'{_hash(script)}'" if script else "'none'")
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(css)),
    ]
    ending = [element("script", Markup(script))] if script else []
    content = element("body", element("main", element("h1", title), body), *ending)
    return f"<!doctype html>\n{element('html', element('head', *head), content, lang='en')}\n"


def write(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(staging, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(staging, path)
    except BaseException:
        os.unlink(staging)
        raise


def _attribute(key: str, value: str | int | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    if isinstance(value, bool):
        return f" {name}" if value else ""
    return f' {name}="{html.escape(str(value))}"'


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


_STYLE = """
:root {
  --page: #f6f6f4; --card: #ffffff; --line: #dddcd8; --ink: #1c1c1a; --soft: #63625d;
  --accent: #1f5fbf; --on-accent: #ffffff; --bad: #9a3412; --bad-page: #fdeee6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #151618; --card: #1f2124; --line: #36383d; --ink: #ececea; --soft: #a3a39d;
    --accent: #8ab4f8; --on-accent: #10233f; --bad: #fdba8c; --bad-page: #3b2418;
  }
}
*, ::before, ::after { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 90rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 3rem; }
h1 { margin: 0 0 1rem; font-size: clamp(1.4rem, 3vw, 1.9rem); line-height: 1.2; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.figures { display: flex; flex-wrap: wrap; gap: 0.75rem 2.5rem; margin: 0 0 1.25rem; }
.figures dt { color: var(--soft); font-size: 0.85rem; }
.figures dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
"""
