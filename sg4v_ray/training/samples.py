# SPDX-License-Identifier: Apache-2.0
"""The samples of a dataset artifact: one Arrow file, mapped and never read whole."""

from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.records import Sample, check_columns, from_table
from sg4v_ray.core.storage import Storage

FILE: Final = "samples.arrow"


class Samples:
    """The samples of a dataset file, which is mapped and not read into memory."""

    def __init__(self, file: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self._where = str(file)
        check_columns(self._reader.schema, Sample, where=self._where)
        count = self._reader.num_record_batches
        sizes = [self._reader.get_batch(i).num_rows for i in range(count)]
        self._ends = np.cumsum(sizes)

    def __reduce__(self) -> tuple[type["Samples"], tuple[Path]]:
        return Samples, (Path(self._where),)  # another process maps the file itself

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        one = self._reader.get_batch(number).slice(index - start, 1)
        sample: Sample = from_table(Sample, pa.Table.from_batches([one]), where=self._where)[0]
        return sample


def open_samples(storage: Storage, dataset: Ref) -> Samples:
    """Return the samples of a dataset, from this node's checked copy if it lies in a bucket."""
    folder = storage.localise(
        dataset.path,
        cache=Path("~/.cache/sg4v-datasets"),
        digests={FILE: find(storage, dataset).digests[FILE]},
    )
    return Samples(folder / FILE)
