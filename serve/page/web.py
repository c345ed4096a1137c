# SPDX-License-Identifier: Apache-2.0
"""The page as a web application: Gradio with everything off that it does not need."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp

from serve.config import ServeConfig
from serve.page.actions import Actions, PageLimits
from serve.page.blocks import blocks
from serve.page.captions import CaptionCalls
from serve.page.client import ApiClient
from serve.page.config import PageConfig
from serve.page.door import Door
from serve.page.sessions import Sessions
from serve.page.style import CSS, HEAD, theme

_GRACE_S: Final = 10.0
"""The server's own deadline comes before that of its client, and our words before either."""


def web(config: ServeConfig, page: PageConfig, *, api: str, uploads: Path) -> ASGIApp:
    """Return the application.

    Args:
        config: of the server, whose limits are the page's too.
        page: how it is served.
        api: address of the server.
        uploads: an empty folder.
    """
    limits = PageLimits(
        image=config.limits.image,
        # In a body an image takes four bytes for three, and some more around it.
        calls=CaptionCalls(
            max_images=config.limits.max_caption_images,
            max_bytes=config.limits.max_body_bytes * 7 // 10,
        ),
        max_images=page.max_images,
        keep_s=page.keep_s,
        needs_key=not config.auth.anonymous,
        longest_s=config.limits.longest_s - _GRACE_S,
    )
    client = ApiClient(api, timeout_s=config.limits.longest_s + _GRACE_S)
    sessions = Sessions(page.max_sessions, keep_s=page.keep_s)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # the one way to tell Gradio
    shown = blocks(Actions(client, sessions, limits), limits)
    return Door(
        _mounted(shown, limits, client),
        knows=sessions.knows,
        uploads=uploads,
        max_upload_bytes=page.max_images * limits.image.max_bytes,
        is_for_this_machine=config.auth.anonymous,
    )


def _mounted(shown: gr.Blocks, limits: PageLimits, client: ApiClient) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await client.close()

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    return gr.mount_gradio_app(
        app,
        shown,
        path="",
        theme=theme(),
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
        max_file_size=limits.image.max_bytes,
        allowed_paths=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
    )
