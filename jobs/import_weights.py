# SPDX-License-Identifier: Apache-2.0
"""Import weights of others (ShareGPT4V, LLaVA, llava-hf, Vicuna with CLIP) as a model artifact.

python -m jobs.import_weights --kind published --source FOLDER --out.name sharegpt4v-7b
    [--vision-tower FOLDER] [--projector FILE] --where.root $PWD/runs
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs._cli import main, summary
from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.config import to_plain
from sg4v_ray.core.lease import hold
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import MODEL_FOLDER
from sg4v_ray.model import importing


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportJob:
    """What is imported, and to where."""

    config: Annotated[importing.ImportConfig, tyro.conf.arg(name="")]
    paths: Annotated[importing.SourcePaths, tyro.conf.arg(name="")]
    where: Where
    out: Ref = Ref(name="imported")
    """The new artifact."""


def import_weights(job: ImportJob) -> Manifest:
    """Write the model of a job as a finished artifact; open it if it is finished.

    Raises:
        ArtifactDrift: `out` exists and was made from something else.
        ConfigError, ContractError: the source cannot be a model of ours; see `importing`.
        LeaseHeld: another job is writing it.
    """
    storage, out = job.where.storage, job.out
    inputs = importing.inputs_of(job.config, job.paths)
    if is_finished(storage, out, config=job.config, inputs=inputs):
        return find(storage, out)
    source = importing.read_source(job.config, job.paths, name=out.name)
    home = storage.sub(out.path)
    with hold(home) as lease, tempfile.TemporaryDirectory(prefix="sg4v-import-") as folder:
        if is_finished(storage, out, config=job.config, inputs=inputs):  # since the first check
            return find(storage, out)
        begin(storage, out, job.config, inputs=inputs, lease=lease)
        tower = importing.write_model(source, job.config, job.paths, Path(folder))
        home.delete(MODEL_FOLDER)
        return commit(
            storage,
            out,
            config=job.config,
            inputs=inputs,
            counts={
                "tensors": len(source.state),
                "parameters": sum(one.numel() for one in source.state.values()),
            },
            digests=home.upload(Path(folder), MODEL_FOLDER),
            metrics={"model": to_plain(source.model), "vision_tower_sha256": tower},
            lease=lease,
        )


def run() -> None:
    """Run the job with the flags of this process."""
    job = tyro.cli(ImportJob, description=__doc__)
    print(summary(import_weights(job)))


if __name__ == "__main__":
    main(run, stopped="nothing is imported, run the same again")
