# SPDX-License-Identifier: Apache-2.0
"""What the Python clients of this folder share: arguments, and saying how far they came."""

import base64
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

WRONG_KEY = "sg4v-nobody"
NO_MODEL = "no-such-model"
NO_IMAGE = "data:image/png;base64," + base64.b64encode(b"this is no image").decode()


@dataclass(frozen=True)
class Task:
    """What a client is asked to do: `client_....py MODEL IMAGE WORD`."""

    model: str
    image: Path
    word: str
    """An answer about the image has it."""

    @property
    def uri(self) -> str:
        """The image as a URI."""
        return "data:image/png;base64," + base64.b64encode(self.image.read_bytes()).decode()


def task(package: str) -> Task:
    """Return the task of the command line, and print whose version does it."""
    print(f"client: {package} {metadata.version(package)}", flush=True)
    model, image, word = sys.argv[1:]
    return Task(model, Path(image), word)


def done(what: str) -> None:
    """Print that this works; the report lists it."""
    print(f"works: {what}", flush=True)


@contextmanager
def raises(kind: type[Exception]) -> Iterator[None]:
    """Demand that the client raises this error of its own inside the block."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was expected, and nothing was raised")
