# SPDX-License-Identifier: Apache-2.0
"""What every bench does alike: a folder of its own, and parts in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from sg4v_ray.core.errors import ConfigError, Sg4vError

_MARKER: Final = ".sg4v-bench"
"""A file in each folder that a bench made, and so may empty."""


def empty(root: Path) -> None:
    """Make the bench's folder, without what an earlier bench left in it.

    Raises:
        ConfigError: no bench made this folder, so what lies there may be dear to somebody.
    """
    if root.exists() and any(root.iterdir()):
        if not (root / _MARKER).exists():
            raise ConfigError(f"--root {root} holds files that no bench wrote; name a new folder")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / _MARKER).touch()


def last_line(
    module: str,
    flags: Sequence[str],
    *,
    threads: int,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run a module in a process of its own; print and return what its last line says.

    Args:
        module: which.
        flags: of its command line.
        threads: what OMP_NUM_THREADS is there.
        more: other variables of its environment.

    Raises:
        Sg4vError: it failed; its own error is above.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), **more}
    argv = [sys.executable, "-m", module, *flags]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        part = " ".join([module, *flags])
        raise Sg4vError(f"{part} ended with exit code {done.returncode}; see above")
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    found: dict[str, Any] = json.loads(line)
    return found
