# SPDX-License-Identifier: Apache-2.0
"""How the page looks: nothing of it is loaded from elsewhere, fonts neither."""

from typing import Final

import gradio as gr

_SANS: Final = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO: Final = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
HEAD: Final = (
    # Else browsers ask for /favicon.ico, which is the API's and needs a key.
    '<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 '
    "viewBox=%220 0 16 16%22%3E%3Crect width=%2216%22 height=%2216%22 rx=%224%22 "
    "fill=%22%230d9488%22/%3E%3Ccircle cx=%228%22 cy=%228%22 r=%223.5%22 fill=%22none%22 "
    'stroke=%22white%22 stroke-width=%222%22/%3E%3C/svg%3E">'
)
CSS: Final = """
.gradio-container main { width: 100%; max-width: 66rem !important; margin: 0 auto !important;
  padding: 0.25rem 1rem !important; }
footer { display: none !important; }
#top { align-items: center; flex-wrap: nowrap; }
#title h1 { font-size: 1.2rem; font-weight: 650; margin: 0; white-space: nowrap; }
#title span { color: var(--body-text-color-subdued); font-weight: 400; }
#key { max-width: 20rem; margin-left: auto; }
#chat-model, #caption-model { max-width: 18rem; }
.hint { margin: 0; padding: 28vh 1rem 0; text-align: center;
  color: var(--body-text-color-subdued); }
#said:empty, #said:not(:has(p)) { display: none; }
.notice { margin: 0; padding: 0.5rem 0.75rem; border-radius: var(--radius-md);
  border: 1px solid #d97706; color: var(--body-text-color);
  background: color-mix(in srgb, #d97706 12%, transparent); }
.bar { align-items: center; flex-wrap: nowrap; }
body { --notice: 0rem; --picture: 0rem; }
body:has(.notice) { --notice: 4rem; }
body:has(#question .thumbnails) { --picture: 3rem; }
#chat { height: calc(100vh - 16rem - var(--notice) - var(--picture)); min-height: 9rem;
  overflow-y: auto; border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); }
.talk { display: flex; flex-direction: column; gap: 0.6rem; padding: 1rem; }
.talk p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.talk .asked { align-self: flex-end; max-width: 75%; padding: 0.5rem 0.75rem;
  border: 1px solid color-mix(in srgb, var(--color-accent) 25%, transparent);
  background: var(--color-accent-soft); border-radius: 0.9rem 0.9rem 0.2rem 0.9rem; }
.talk .asked img { display: block; max-height: 11rem; max-width: 100%; object-fit: contain;
  border-radius: var(--radius-md); margin: 0.15rem 0 0.4rem; }
.talk .asked img:last-child { margin-bottom: 0.15rem; }
.talk .answer { align-self: flex-start; max-width: 85%; }
.talk .grows::after { content: "\\258d"; color: var(--color-accent); }
.talk .note { font-size: 0.8rem; color: var(--body-text-color-subdued); margin-top: -0.35rem; }
.talk .empty { color: var(--body-text-color-subdued); text-align: center; margin-top: 18vh; }
.captions p { display: flex; justify-content: space-between; align-items: center;
  margin: 0.25rem 0 0.5rem; }
.captions a { padding: 0.25rem 0.75rem; border-radius: var(--radius-md); text-decoration: none;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color); }
.captions a:hover { border-color: var(--color-accent); }
.captions table { width: 100%; border-collapse: collapse; font-size: 0.92rem; }
.captions th { text-align: left; font-weight: 600; color: var(--body-text-color-subdued); }
.captions th, .captions td { padding: 0.4rem 0.6rem; vertical-align: top; border: 0;
  border-bottom: 1px solid var(--border-color-primary); }
.captions img { width: 56px; min-width: 56px; height: 56px; object-fit: cover;
  border-radius: var(--radius-sm); }
.captions .file { min-width: 8rem; max-width: 14rem; overflow-wrap: anywhere; }
.captions .said { white-space: pre-wrap; overflow-wrap: anywhere; }
.captions .tokens { text-align: right; font-variant-numeric: tabular-nums; }
.captions .error { color: #d97706; }
@media (max-width: 40rem) {
  #title span { display: none; }
  .talk .asked, .talk .answer { max-width: 100%; }
}
"""


def theme() -> gr.themes.Base:
    """Return a theme with the fonts that the reader's system has: none is loaded."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        spacing_size="sm",
        text_size="md",
        font=_SANS,
        font_mono=_MONO,
    )
