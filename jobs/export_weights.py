# SPDX-License-Identifier: Apache-2.0
"""Export a finished model for tools of others: as llava-hf, or as ShareGPT4V publishes.

python -m jobs.export_weights --model vlm@v1 --layout published --to FOLDER --where.root $PWD/runs
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs._cli import main
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import ModelSource
from sg4v_ray.model.exporting import Layout, export_model
from sg4v_ray.training.launch import model_config


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """Which model is written, how, and where."""

    model: str
    """NAME@VERSION of a finished model."""
    layout: Layout
    """`llava-hf` loads in transformers, vLLM and SGLang; `published` in ShareGPT4V's own code."""
    to: Path
    """Folder on this machine, absent or empty."""
    where: Where


def export_weights(job: ExportJob) -> None:
    """Write the folder of a job.

    Raises:
        ArtifactMissing: the model is not finished.
        ConfigError: no such address, or the folder has files in it.
        ContractError, StorageError: the artifact is no model, or its files were changed.
    """
    name, at, version = job.model.partition("@")
    if not at:
        raise ConfigError(f"--model {job.model!r} has no version; write NAME@VERSION, as vlm@v1")
    ref = Ref(name=name, version=version)
    shape = model_config(find(job.where.storage, ref))
    folder = ModelSource(root=job.where.root, ref=ref).localise()
    export_model(folder, shape, layout=job.layout, to=job.to.absolute())


def run() -> None:
    """Run the job with the flags of this process."""
    job = tyro.cli(ExportJob, description=__doc__)
    export_weights(job)
    print(f"{job.model} as {job.layout}: {job.to.absolute()}")


if __name__ == "__main__":
    main(run, stopped="nothing was written")
