# SPDX-License-Identifier: Apache-2.0
"""What an actor raises on purpose ends the job as itself, with the words that say what to do."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sg4v_ray.captions import collect
from sg4v_ray.captions.choose import SampleConfig, Share
from sg4v_ray.captions.collect import CollectConfig
from sg4v_ray.captions.prompts import DETAILED_2026_11
from sg4v_ray.captions.teacher import Endpoint, TeacherConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import TeacherUnusable
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import Batching
from sg4v_ray.sources import index, shapes
from sg4v_ray.sources.folder import Folder
from sg4v_ray.sources.index import IndexConfig


class _Locked(BaseHTTPRequestHandler):
    """A teacher that knows nobody's key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"error": {"message": "Incorrect API key"}}'
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def locked_teacher() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Locked)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("ray_cluster")
def test_a_wrong_key_is_told_as_such(locked_teacher: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shapes.draw(1).save(photos / "a.png")
    where = Where(root=str(tmp_path / "root"), progress=False, engine_cpus=0.5)
    images = Ref(name="images")
    index.run(IndexConfig(sources=(Folder(path=str(photos)),)), out=images, where=where)
    with pytest.raises(TeacherUnusable, match=r"(?s)HTTP 401.*Check the key") as caught:
        collect.run(
            CollectConfig(
                sample=SampleConfig(shares=(Share(source="folder", prompt=DETAILED_2026_11.name),)),
                teacher=TeacherConfig(model="gpt-4o"),
            ),
            endpoint=Endpoint(base_url=locked_teacher, api_key_env=None),
            images=images,
            out=Ref(name="teacher-captions"),
            where=where,
            batching=Batching(),
        )
    assert "Traceback" not in str(caught.value)
