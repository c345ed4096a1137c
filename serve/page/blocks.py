# SPDX-License-Identifier: Apache-2.0
"""What is on the page, in Gradio's words, and which action follows which click."""

from typing import Any, Final

import gradio as gr

from serve.page.actions import Actions, PageLimits
from serve.page.view import hello, talk

_FORMATS: Final = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"]
_HOW: Final[dict[str, Any]] = {"api_visibility": "private", "show_progress": "hidden"}
_BARE: Final[dict[str, Any]] = {"show_label": False, "container": False}


def blocks(actions: Actions, limits: PageLimits) -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(
        title="sg4v-ray",
        analytics_enabled=False,
        delete_cache=(min(limits.keep_s, 300), limits.keep_s),
    ) as page:
        key, connect = _top(needs_key=limits.needs_key)
        said = _html(hello(needs_key=limits.needs_key), elem_id="said")
        with gr.Column(visible=False, elem_id="work") as work, gr.Tabs():
            with gr.Tab("Chat"):
                chat, chat_model = _chat_tab(actions, key, said)
            with gr.Tab("Captions"):
                caption_model = _captions_tab(actions, key, said, limits)
        outputs = [said, connect, work, chat_model, caption_model, chat]
        gr.on([connect.click, key.submit], actions.connect, [key], outputs, **_HOW)
        if not limits.needs_key:
            page.load(actions.connect, [key], outputs, **_HOW)
    page.queue(default_concurrency_limit=64, max_size=256, api_open=False)
    return page


def _top(*, needs_key: bool) -> tuple[gr.Textbox, gr.Button]:
    with gr.Row(elem_id="top"):
        _html("<h1>sg4v-ray <span>chat and captions</span></h1>", elem_id="title")
        key = gr.Textbox(
            label="API key",
            type="password",
            placeholder="API key",
            elem_id="key",
            visible=needs_key,
            max_lines=1,
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
            **_BARE,
        )
        connect = gr.Button(
            "Connect", elem_id="connect", variant="primary", size="md", scale=0, min_width=110
        )
    return key, connect


def _chat_tab(actions: Actions, key: gr.Textbox, said: gr.HTML) -> tuple[gr.HTML, gr.Dropdown]:
    with gr.Row(elem_classes="bar"):
        model = _models("chat-model")
        gr.HTML()
        clear = gr.Button("Clear", size="md", scale=0, min_width=90, elem_id="clear")
    chat = _html(talk([]), elem_id="chat", autoscroll=True)
    question = gr.MultimodalTextbox(
        label="Question",
        elem_id="question",
        placeholder="Ask something; paste or drop an image here",
        file_types=_FORMATS,
        file_count="single",
        sources=["upload"],
        max_plain_text_length=100_000,
        autofocus=True,
        **_BARE,
    )
    outputs = [chat, question, said]
    question.submit(actions.ask, [question, model, key], outputs, **_HOW)
    question.stop(actions.stop, None, None, **_HOW)
    clear.click(actions.clear, None, outputs, **_HOW)
    return chat, model


def _captions_tab(
    actions: Actions, key: gr.Textbox, said: gr.HTML, limits: PageLimits
) -> gr.Dropdown:
    files = gr.File(
        label=f"Up to {limits.max_images} images",
        elem_id="images",
        file_count="multiple",
        file_types=_FORMATS,
        height=150,
    )
    with gr.Row(elem_classes="bar"):
        model = _models("caption-model")
        instruction = gr.Textbox(
            label="Instruction",
            placeholder="Instruction (default: the model's own)",
            elem_id="instruction",
            max_lines=1,
            scale=3,
            **_BARE,
        )
        start = gr.Button(
            "Caption", variant="primary", size="md", scale=0, min_width=110, elem_id="caption"
        )
        stop = gr.Button("Stop", size="md", scale=0, min_width=90, elem_id="caption-stop")
    made = _html("", elem_id="made")
    start.click(actions.caption, [files, model, instruction, key], [made, said], **_HOW)
    stop.click(actions.stop_captions, None, None, **_HOW)
    return model


def _models(name: str) -> gr.Dropdown:
    # Else Gradio checks what is chosen against a list that is gone when the page was restarted.
    return gr.Dropdown(
        [], label="Model", elem_id=name, allow_custom_value=True, min_width=180, **_BARE
    )


def _html(value: str, **options: Any) -> gr.HTML:
    """Return HTML that is ours alone, without Gradio's script."""
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **options)
