# SPDX-License-Identifier: Apache-2.0
"""The nano captioner that comes with this package: an artifact like any other, copied to a root.

`make loop` made it (see its manifest). It knows the shapes of easy-VQA and nothing else.
"""

import json
from importlib import resources
from pathlib import Path

from sg4v_ray.core.artifact import MANIFEST, Ref, find
from sg4v_ray.core.errors import ArtifactDrift, ArtifactMissing
from sg4v_ray.core.storage import Storage

CAPTIONER = Ref(name="nano-captioner", version="v1")
_MODEL = "model"


def folder() -> Path:
    """Return where the captioner lies in the installed package."""
    return Path(str(resources.files("sg4v_ray.recipes"))) / "nano_captioner"


def install_captioner(storage: Storage) -> Ref:
    """Copy the captioner below a root unless it is there; its manifest is copied last.

    Raises:
        ArtifactMissing: this checkout comes without a captioner.
        ArtifactDrift: another one was copied there before.
    """
    if not (folder() / MANIFEST).is_file():
        raise ArtifactMissing(
            f"this checkout has no captioner in {folder()}; run `make loop`, then `make embed`"
        )
    manifest = json.loads((folder() / MANIFEST).read_text())
    if storage.exists(f"{CAPTIONER.path}/{MANIFEST}"):
        if find(storage, CAPTIONER).digests != manifest["digests"]:
            raise ArtifactDrift(
                f"{storage.uri(CAPTIONER.path)} is another captioner than the one of this package; "
                "use another --where.root, or delete what was made with it (`make clean-demo`)"
            )
        return CAPTIONER
    storage.upload(folder() / _MODEL, f"{CAPTIONER.path}/{_MODEL}")
    renamed = {**manifest, "name": CAPTIONER.name, "version": CAPTIONER.version}
    storage.create(f"{CAPTIONER.path}/{MANIFEST}", (json.dumps(renamed, indent=1) + "\n").encode())
    return CAPTIONER
