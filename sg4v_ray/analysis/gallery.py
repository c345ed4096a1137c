# SPDX-License-Identifier: Apache-2.0
"""A gallery: images beside their captions on one page, rejects with their reasons.

The page filters by reject reason and searches text in the browser. `#reject=truncated`,
`#only=captions` and `#q=red+circle` after its address choose a view, so that one can be sent on.
"""

import itertools
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sg4v_ray.core import html
from sg4v_ray.core.html import Markup, element

_PIXEL_ART = 128
"""Images up to this many pixels wide are enlarged without smoothing; photographs are not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryItem:
    """One image of a gallery."""

    id: str
    image: bytes | None
    """PNG to show, or None where there is nothing to show."""
    text: str | None
    reject: str | None = None
    """A `Reject` value, or None for a good caption."""
    detail: str | None = None
    """What a person needs to know about the reject."""
    group: str | None = None
    """Heading that it stands below; items of a group follow each other."""
    notes: tuple[str, ...] = ()
    """Facts in small print, e.g. what was asked."""


def write_gallery(
    path: Path,
    *,
    title: str,
    figures: Sequence[tuple[str, str]],
    items: Iterable[GalleryItem],
) -> None:
    """Write a gallery as one HTML file. The whole page is held in memory: show a sample."""
    html.write(path, render_gallery(title=title, figures=figures, items=items))


def render_gallery(
    *,
    title: str,
    figures: Sequence[tuple[str, str]],
    items: Iterable[GalleryItem],
    above: Markup | None = None,
    style: str = "",
) -> str:
    """Return a gallery as the text of one HTML file.

    Args:
        above: shown between the figures and the images, with its own `style`.
    """
    rejects: Counter[str | None] = Counter()
    walls = []
    for group, members in itertools.groupby(items, key=lambda item: item.group):
        cards = []
        for item in members:
            rejects[item.reject] += 1
            cards.append(_card(item))
        walls.append(_wall(group, cards))
    nothing = element("p", "Nothing matches this search.", id="nothing", hidden=bool(walls))
    top = [html.figures(figures)] if above is None else [html.figures(figures), above]
    body = html.join([*top, _toolbar(rejects), nothing, *walls])
    return html.page(title, body, style=_STYLE + style, script=_SCRIPT)


def _wall(group: str | None, cards: list[Markup]) -> Markup:
    heading = [] if group is None else [element("h2", group)]
    label = group or "Images and captions"
    return element("section", *heading, element("div", *cards, class_="wall"), aria_label=label)


def _card(item: GalleryItem) -> Markup:
    marks = {} if item.reject is None else {"data_reject": item.reject}
    return element("article", _picture(item), element("div", *_words(item)), **marks)


def _picture(item: GalleryItem) -> Markup:
    if item.image is None:
        return element("div", "no image", class_="picture missing")
    width, height = struct.unpack(">II", item.image[16:24])  # a PNG begins with its size
    image = element(
        "img",
        src=html.data_uri(item.image, "image/png"),
        alt=f"Image {item.id}",
        width=width,
        height=height,
        loading="lazy",
        decoding="async",
        class_="small" if width <= _PIXEL_ART else "",
    )
    return element("div", image, class_="picture")


def _words(item: GalleryItem) -> list[Markup]:
    words = []
    if item.reject is not None:
        words.append(element("p", element("span", item.reject, class_="reject")))
    if item.detail:
        words.append(element("p", item.detail, class_="detail"))
    if item.text is not None:
        words.append(element("p", item.text, class_="text"))
    elif item.reject is None:
        words.append(element("p", "no text", class_="detail"))
    notes = [element("p", note, class_="note") for note in item.notes]
    return [*words, *notes, element("p", item.id, class_="id")]


def _toolbar(rejects: Counter[str | None]) -> Markup:
    """Return search and filters. They need the script, which is what makes them visible."""
    chips = [_chip("all", "All", rejects.total(), checked=True)]
    if rejects[None]:
        chips.append(_chip("captions", "Captions", rejects[None]))
    for reason, count in rejects.most_common():
        if reason is not None:
            chips.append(_chip(f"reject:{reason}", reason, count))
    search = element(
        "input",
        type="search",
        id="query",
        placeholder="Search (press /)",
        aria_label="Search captions, ids and reasons",
        autocomplete="off",
        spellcheck="false",
    )
    shown = element("output", id="shown", aria_live="polite")
    legend = element("legend", "Show", class_="unseen")
    return element(
        "search",
        element("div", search, shown, class_="find"),
        element("fieldset", legend, *chips),
        id="toolbar",
        hidden=True,
    )


def _chip(value: str, label: str, count: int, *, checked: bool = False) -> Markup:
    radio = element("input", type="radio", name="show", value=value, checked=checked)
    number = element("b", f"{count:,}")
    kind = "chip bad" if value.startswith("reject:") else "chip"
    return element("label", radio, element("span", label), number, class_=kind)


_STYLE = """
#toolbar {
  position: sticky; top: 0; z-index: 1; display: block; margin: 0 -0.5rem 1rem;
  padding: 0.6rem 0.5rem; background: var(--page); border-bottom: 1px solid var(--line);
}
.find { display: flex; gap: 1rem; align-items: center; margin-bottom: 0.6rem; }
#query {
  flex: 1; min-width: 0; max-width: 34rem; padding: 0.45rem 0.75rem; font: inherit;
  color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem;
}
#query::placeholder { color: var(--soft); opacity: 1; }
#shown { color: var(--soft); font-size: 0.9rem; white-space: nowrap; }
fieldset {
  display: flex; gap: 0.4rem; margin: 0 -0.25rem; padding: 0.25rem; border: 0; min-width: 0;
  overflow-x: auto; scrollbar-width: thin;
}
.unseen { position: absolute; clip-path: inset(50%); }
.chip {
  position: relative; display: inline-flex; gap: 0.5rem; align-items: center; flex: none;
  padding: 0.2rem 0.75rem;
  border: 1px solid var(--line); border-radius: 99rem; background: var(--card); cursor: pointer;
  font-size: 0.9rem;
}
.chip input { position: absolute; opacity: 0; pointer-events: none; }
.chip b { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }
.chip.bad span { color: var(--bad); }
.chip:hover { border-color: var(--accent); }
.chip:has(:checked) { background: var(--accent); border-color: var(--accent); }
.chip:has(:checked) :is(span, b) { color: var(--on-accent); }
.chip:has(:focus-visible) { outline: 2px solid var(--accent); outline-offset: 2px; }
.wall {
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr));
}
article {
  display: grid; grid-template-columns: 8rem minmax(0, 1fr); gap: 1rem; align-items: start;
  padding: 0.75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 0.6rem; content-visibility: auto; contain-intrinsic-size: auto 9.6rem;
}
article > div { display: flex; flex-direction: column; gap: 0.35rem; min-height: 100%; }
article p { margin: 0; overflow-wrap: anywhere; }
.picture { width: 8rem; }
.picture img {
  display: block; width: 100%; height: auto; border-radius: 0.35rem;
  outline: 1px solid var(--line); outline-offset: -1px;
}
.picture img.small { image-rendering: pixelated; }
.missing {
  display: grid !important; place-items: center; aspect-ratio: 1; min-height: 0 !important;
  color: var(--soft); font-size: 0.85rem; border: 1px dashed var(--line); border-radius: 0.35rem;
}
.text { white-space: pre-wrap; }
.reject {
  display: inline-block; padding: 0.05rem 0.5rem; border-radius: 0.35rem; font-size: 0.9rem;
  font-weight: 600; color: var(--bad); background: var(--bad-page);
}
.detail, .note { color: var(--soft); font-size: 0.9rem; }
h2 { margin: 1.75rem 0 0.75rem; font-size: 1.2rem; }
.id {
  margin-top: auto !important; color: var(--soft);
  font: 0.78rem/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
@media (min-width: 48rem) { fieldset { flex-wrap: wrap; } }
@media (max-width: 30rem) {
  article { grid-template-columns: 6rem minmax(0, 1fr); }
  .picture { width: 6rem; }
}
@media print { #toolbar { display: none; } article { break-inside: avoid; } }
"""

_SCRIPT = """
"use strict";
const cards = [...document.querySelectorAll("article")];
const words = cards.map(card => card.textContent.toLowerCase());
const kinds = cards.map(card =>
  "reject" in card.dataset ? "reject:" + card.dataset.reject : "captions");
const chips = [...document.querySelectorAll("[name=show]")];
const query = document.querySelector("#query");
const number = value => value.toLocaleString("en");

function apply() {
  const terms = query.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const chosen = chips.find(chip => chip.checked).value;
  const counts = new Map(chips.map(chip => [chip.value, 0]));
  let shown = 0;
  cards.forEach((card, i) => {
    const found = terms.every(term => words[i].includes(term));
    const visible = found && (chosen === "all" || chosen === kinds[i]);
    card.hidden = !visible;
    shown += visible;
    for (const kind of found ? ["all", kinds[i]] : []) counts.set(kind, counts.get(kind) + 1);
  });
  for (const chip of chips) {
    chip.parentElement.querySelector("b").textContent = number(counts.get(chip.value));
  }
  for (const section of document.querySelectorAll("section")) {
    section.hidden = !section.querySelector("article:not([hidden])");
  }
  document.querySelector("#shown").textContent =
    `${number(shown)} of ${number(cards.length)}`;
  document.querySelector("#nothing").hidden = shown > 0;
}

function remember() {
  const chosen = chips.find(chip => chip.checked).value;
  const view = new URLSearchParams();
  if (chosen.startsWith("reject:")) view.set("reject", chosen.slice(7));
  if (chosen === "captions") view.set("only", "captions");
  if (query.value) view.set("q", query.value);
  history.replaceState(null, "", "#" + view);
}

function recall() {
  const view = new URLSearchParams(location.hash.slice(1));
  const wanted = view.has("reject") ? "reject:" + view.get("reject") : view.get("only");
  (chips.find(chip => chip.value === wanted) ?? chips[0]).checked = true;
  query.value = view.get("q") ?? "";
  apply();
}

for (const input of [query, ...chips]) {
  input.addEventListener("input", () => { apply(); remember(); });
}
addEventListener("hashchange", recall);
addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== query) {
    event.preventDefault();
    query.focus();
  }
  if (event.key === "Escape" && document.activeElement === query && query.value) {
    query.value = "";
    apply();
    remember();
  }
});
document.querySelector("#toolbar").hidden = false;
recall();
"""
