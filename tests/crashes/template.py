# SPDX-License-Identifier: Apache-2.0
"""A process with all imports of a driver done. It forks one driver for each line of its stdin.

It runs no thread and no Ray, so that a fork is a clean start.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import ray.data  # noqa: F401

from jobs._cli import main
from tests.crashes import job


def _drive(order: dict[str, Any]) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(order["environment"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    main(lambda: job.run(order["root"], order["images"], order["repaired"], Path(order["result"])))


def _fork(order: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        _drive(order)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the drivers
    print("ready", flush=True)
    for line in sys.stdin:
        print(_fork(json.loads(line)), flush=True)
