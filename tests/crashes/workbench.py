# SPDX-License-Identifier: Apache-2.0
"""All processes that crash points need: a Ray cluster, a template of drivers, an S3, both shims."""

import json
import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from unittest.mock import patch

import boto3
from moto.server import ThreadedMotoServer

from sg4v_ray.core.artifact import begin, commit
from sg4v_ray.core.lease import hold
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import shapes
from tests.crashes import job
from tests.crashes.events import Controller, Point, Run, ShimServer, children, command_line
from tests.crashes.s3_proxy import S3Proxy

REPOSITORY = Path(__file__).parents[2]
BUCKET = "sg4v-crashes"
NUM_IMAGES = 14
DAMAGED = ("i03.png", "i07.png")
"""Repaired before the retry."""
EMPTY = "i11.png"
"""Stays rejected."""
RUN_DEADLINE_S = 240.0


@dataclass(frozen=True)
class Place:
    """The root and the images of one point."""

    name: str
    root: str
    images: str
    folder: Path
    """Logs and results on this machine."""

    @property
    def storage(self) -> Storage:
        """The root."""
        return Storage(self.root)


@dataclass
class Workbench:
    """Starts drivers one after the other."""

    folder: Path
    """Of everything that is written on this machine."""
    controller: Controller
    template: "subprocess.Popen[str]"
    model: Path
    pictures: Path
    environment: dict[str, str]
    """Of the drivers."""

    def place(self, name: str, store: str) -> Place:
        """Write images and a captioner to a new root."""
        local = self.folder / "points" / name
        local.mkdir(parents=True)
        base = f"s3://{BUCKET}/{name}" if store == "s3" else str(local)
        place = Place(name, f"{base}/root", f"{base}/images", local)
        images = Storage(place.images)
        for number in range(NUM_IMAGES):
            key = f"i{number:02d}.png"
            data = (self.pictures / key).read_bytes()
            data = b"no image" if key in DAMAGED else b"" if key == EMPTY else data
            images.put(key, data)
        with hold(begin(place.storage, job.CAPTIONER, {})) as lease:
            digests = place.storage.upload(self.model, f"{job.CAPTIONER.path}/model")
            commit(
                place.storage,
                job.CAPTIONER,
                config={},
                inputs={},
                counts={},
                digests=digests,
                lease=lease,
            )
        return place

    def drive(self, place: Place, point: Point | None = None) -> tuple[Run, bool]:
        """Run the job once; return its events, and whether it finished."""
        result = place.folder / "result.json"
        order = {
            "log": str(place.folder / "driver.log"),
            "environment": self.environment,
            "root": place.root,
            "images": place.images,
            "repaired": {key: str(self.pictures / key) for key in DAMAGED},
            "result": str(result),
        }
        run = Run(place.name, point)
        assert self.template.stdin is not None
        assert self.template.stdout is not None
        with self.controller.starting(run):
            self.template.stdin.write(json.dumps(order) + "\n")
            self.template.stdin.flush()
            run.driver = int(self.template.stdout.readline())
        _wait_for_end(run.driver)
        self.controller.run = None
        is_finished = result.exists()
        result.unlink(missing_ok=True)
        return run, is_finished


def _wait_for_end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([handle], [], [], RUN_DEADLINE_S)
    finally:
        os.close(handle)
    if not ended:
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        raise TimeoutError(f"a driver did not end within {RUN_DEADLINE_S:g} s")


@contextmanager
def workbench(folder: Path, model: Path) -> Iterator[Workbench]:
    """Start all processes; all of them end with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(NUM_IMAGES):
        shapes.draw(number).save(pictures / f"i{number:02d}.png")
    with ExitStack() as stack:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        stack.callback(server.stop)
        host, port = server.get_host_and_port()
        controller = Controller()
        proxy = S3Proxy((host, port), controller)
        stack.callback(proxy.server_close)
        stack.callback(proxy.shutdown)
        # Not below `folder`, whose path may be too long for a socket.
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory()), "events")
        shim = ShimServer(socket, folder / "points", controller)
        stack.callback(shim.server_close)
        stack.callback(shim.shutdown)
        s3 = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        own = {**s3, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        stack.enter_context(patch.dict(os.environ, own))
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        started = {
            **os.environ,
            **s3,
            "AWS_ENDPOINT_URL": proxy.url,
            "HOME": str(folder),  # for the node's copies of models
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": f"{Path(__file__).with_name('shim')}:{REPOSITORY}",
            "SG4V_CRASH_SOCKET": str(socket),
            "SG4V_CRASH_FOLDER": str(folder / "points"),
            "SG4V_COMMIT": "crashes",  # else each commit runs git
        }
        started.pop("RAY_ADDRESS", None)
        log = stack.enter_context((folder / "cluster.log").open("w"))
        cluster = stack.enter_context(_process("tests.crashes.cluster", started, log))
        template = stack.enter_context(_process("tests.crashes.template", started, log))
        assert cluster.stdout is not None
        assert template.stdout is not None
        address = cluster.stdout.readline().strip()
        is_ready = template.stdout.readline() == "ready\n"
        assert address, (folder / "cluster.log").read_text()[-3000:]
        assert is_ready, (folder / "cluster.log").read_text()[-3000:]
        (raylet,) = [one for one in children(cluster.pid) if "/raylet/" in command_line(one)]
        controller.raylet = raylet
        yield Workbench(folder, controller, template, model, pictures, {"RAY_ADDRESS": address})


@contextmanager
def _process(
    module: str, environment: dict[str, str], log: IO[str]
) -> Iterator["subprocess.Popen[str]"]:
    """Run a module until the block ends and its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def forget(place: Place) -> None:
    """Delete what a point has written."""
    if not place.root.startswith("s3://"):
        shutil.rmtree(place.folder)
    else:
        Storage(place.root.removesuffix("/root")).delete("")
