# SPDX-License-Identifier: Apache-2.0
"""The command line `llm`, with a model of extra-openai-models.yaml and OPENAI_API_KEY.

Its settings and logs are in a new folder, and its models are at OPENAI_BASE_URL.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from steps import NO_MODEL, WRONG_KEY, Task, done, task


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).with_name("llm")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)


def llm(*arguments: str | Path) -> str:
    """Run `llm`, return what it printed."""
    ran = run(*arguments)
    assert ran.returncode == 0, f"{arguments} ended with {ran.returncode}: {ran.stderr}"
    return ran.stdout.strip()


def fails(status: int, *arguments: str | Path) -> None:
    """Run `llm` and demand that it fails, naming the status of the server's answer."""
    ran = run(*arguments)
    said = f"{arguments} ended with {ran.returncode}: {ran.stderr}"
    assert ran.returncode == 1 and f"Error code: {status}" in ran.stderr, said


def configure(folder: Path, *models: str) -> None:
    """Write the models that `llm` is to know."""
    shared = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key_name": "openai", "vision": True}
    made = [{"model_id": one, "model_name": one, **shared} for one in models]
    # JSON is YAML.
    (folder / "extra-openai-models.yaml").write_text(json.dumps(made))
    os.environ["LLM_USER_PATH"] = str(folder)


def image(it: Task) -> None:
    asked = ("-m", it.model, "What is this?", "-a", it.image, "-o", "temperature", "0")
    text = llm(*asked)
    assert it.word in text, f"no {it.word!r} in {text!r}"
    (logged,) = json.loads(llm("logs", "--json", "-n", "1"))
    assert logged["input_tokens"] and logged["output_tokens"], "streaming gave no usage"
    done("image")
    done("streaming with usage")
    assert llm(*asked, "--no-stream") == text, "whole, it is another answer"
    done("not streaming")


def turns(it: Task) -> None:
    assert llm("-c", "Once more, please.", "-s", "You see one shape."), "nothing was said"
    done("several turns")


def errors(it: Task, folder: Path) -> None:
    asked = ("What is this?", "-a", it.image)
    fails(404, "-m", NO_MODEL, *asked)
    fails(401, "-m", it.model, "--key", WRONG_KEY, *asked)
    broken = folder / "broken.png"
    broken.write_text("this is no image")
    fails(400, "-m", it.model, "What is this?", "--at", broken, "image/png")
    done("errors")


def main() -> None:
    it = task("llm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configure(folder, it.model, NO_MODEL)
        image(it)
        turns(it)
        errors(it, folder)


if __name__ == "__main__":
    main()
