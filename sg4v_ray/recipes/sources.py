# SPDX-License-Identifier: Apache-2.0
"""Caption images from anywhere with the embedded nano captioner: the smallest real jobs.

One recipe a kind of source. Its path is a flag: `python -m jobs.index_images tars --help`.
"""

from sg4v_ray.captions.choose import SampleConfig
from sg4v_ray.captions.score import ScoreConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.inference.clip_config import ClipConfig
from sg4v_ray.recipes.easy_vqa import caption_step
from sg4v_ray.recipes.embedded import CAPTIONER
from sg4v_ray.recipes.line import IndexStep, Line, ScoreStep
from sg4v_ray.recipes.teacher import PAPER_SAMPLE, collect_step, of_source
from sg4v_ray.sources.catalogue import CATALOGUE, PaperImages
from sg4v_ray.sources.folder import Folder, Glob
from sg4v_ray.sources.index import IndexConfig, Source
from sg4v_ray.sources.llava import LlavaImages
from sg4v_ray.sources.tables import HfDataset, ParquetImages
from sg4v_ray.sources.tars import Tars
from sg4v_ray.sources.urls import UrlList


def caption_only(*sources: Source, sample: SampleConfig | None = None) -> Line:
    """Index some sources, caption them or have them captioned by a teacher, and score the captions.

    Args:
        sample: what a teacher is asked; None is all images of the first source.
    """
    images, captions = Ref(name="images"), Ref(name="captions")
    return Line(
        images=(IndexStep(config=IndexConfig(sources=sources), out=images),),
        collect=collect_step(images, sample or of_source(sources[0].name)),
        caption=caption_step(images, CAPTIONER, captions),
        score=ScoreStep(
            config=ScoreConfig(clip=ClipConfig()), captions=captions, out=Ref(name="caption-scores")
        ),
    )


def folder() -> Line:
    """Caption a folder or bucket prefix: --step.0.config.sources.0.path (index_images)."""
    return caption_only(Folder(path="/images"))


def glob() -> Line:
    """Caption the files that a pattern names: --step.0.config.sources.0.pattern."""
    return caption_only(Glob(pattern="/images/**/*.jpg"))


def tars() -> Line:
    """Caption the images inside tar archives (WebDataset): --step.0.config.sources.0.shards."""
    return caption_only(Tars(shards="/images/*.tar"))


def parquet() -> Line:
    """Caption the rows of Parquet files: --step.0.config.sources.0.files."""
    return caption_only(ParquetImages(files="/images/*.parquet"))


def hf_dataset() -> Line:
    """Caption a data set that `datasets` saved to disk: --step.0.config.sources.0.path."""
    return caption_only(HfDataset(path="/dataset"))


def llava_json() -> Line:
    """Caption the images of a LLaVA JSON: --step.0.config.sources.0.json and .images."""
    return caption_only(LlavaImages(json="/data/llava.json", images="/data"))


def urls() -> Line:
    """Caption a list of URLs: --step.0.config.sources.0.path, and the hosts to allow."""
    return caption_only(UrlList(path="/urls.txt"))


def paper_images() -> Line:
    """Caption the paper's sources below one data root: --step.0.config.sources.*.data-root."""
    found = (PaperImages(name=name, data_root="/data") for name in CATALOGUE)
    return caption_only(*found, sample=PAPER_SAMPLE)
