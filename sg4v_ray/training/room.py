# SPDX-License-Identifier: Apache-2.0
"""Whether a node's disk holds what its ranks are about to write there."""

import os
import shutil
import tempfile

from sg4v_ray.core.errors import StorageError
from sg4v_ray.training.ranks import gather


def check_room(needed_bytes: int) -> None:
    """Look whether the temporary folder has room for what all ranks of this node write at once.

    All ranks call this together, and all raise if one has to.

    Args:
        needed_bytes: of this rank.

    Raises:
        StorageError: it has not. Half of a checkpoint would be written before that shows.
    """
    place = (os.uname().nodename, tempfile.gettempdir())
    needed = sum(size for where, size in gather((place, needed_bytes)) if where == place)
    free = shutil.disk_usage(place[1]).free
    problem = None
    if needed > free:
        problem = (
            f"a checkpoint goes to a bucket by way of {place[1]} on {place[0]}, which has "
            f"{free / 1e9:.4g} GB free and needs {needed / 1e9:.4g} GB for the ranks of this "
            "node; make room, or set TMPDIR to a disk with more"
        )
    if first := next(filter(None, gather(problem)), None):
        raise StorageError(first)
