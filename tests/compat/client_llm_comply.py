# SPDX-License-Identifier: Apache-2.0
"""llm-comply: what comes back against OpenAI's own schema, at OPENAI_BASE_URL."""

import json
import os
import subprocess
import sys
from pathlib import Path

from steps import done, task

CASES = {
    "chat-basic-response": "text",
    "chat-system-prompt": "system prompt",
    "chat-multi-turn": "several turns",
    "chat-streaming-response": "streaming",
    "chat-streaming-usage": "streaming with usage",
    "chat-image-input": "image",
    "chat-error-handling": "errors",
}
"""All but those of tools and of reasoning, which these models have not."""
ITS_LENGTH = "got 'length'"
"""When a captioner of shapes stops talking about a photograph says nothing about the server."""


def main() -> None:
    it = task("llm-comply")
    os.environ["OPENRESPONSES_API_KEY"] = os.environ["OPENAI_API_KEY"]
    ran = subprocess.run(
        [
            *(Path(sys.executable).with_name("llm-comply"), "--json", "--format", "openai-chat"),
            *("--base-url", os.environ["OPENAI_BASE_URL"], "--model", it.model),
            *("--filter", ",".join(CASES), "--ignore", ITS_LENGTH),
        ],
        stdout=subprocess.PIPE,
        text=True,
        timeout=90,
    )
    results = json.loads(ran.stdout)["results"]
    assert [one["id"] for one in results] == list(CASES), ran.stdout
    for one in results:
        assert one["status"] == "passed" and not one.get("warnings"), one
        done(CASES[one["id"]])


if __name__ == "__main__":
    main()
