# SPDX-License-Identifier: Apache-2.0
"""Weights of others -> a model folder of ours, from which training, captioning and serving start.

A source is read, compared key by key with what its config.json asks for, and written in our
layout. Nothing is guessed: what is missing, extra or misshapen is an error.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import CLIPVisionConfig

from sg4v_ray.core.errors import ConfigError, WeightsError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.storage import sha256_of
from sg4v_ray.model import convert, open_clip, published, weights
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.model.conversation import Conversation, TemplateName, chat_template
from sg4v_ray.model.geometry import Geometry
from sg4v_ray.model.processor import save_processor
from sg4v_ray.model.source_files import has_weights, read_file, read_folder, read_json

Kind = Literal["published", "llava-hf", "vicuna-clip", "open-clip"]
DtypeName = Literal["float32", "bfloat16", "float16"]

TOWER_FOLDER: Final = "vision_tower"
"""Where ShareGPT4V's training leaves the tower beside the language model."""
_READ: Final = (".json", ".safetensors", ".bin")
_AGAIN: Final = "Download the folder again, or give one of the model that config.json describes."


@identity_keys(
    "ImportConfig",
    kind="kind",
    template="template",
    geometry="geometry",
    dtype="dtype",
    feature_layer="feature_layer",
    seed="seed",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """How a source is understood. Part of identity."""

    kind: Kind
    """`published`: LLaVA's or ShareGPT4V's folder, with a vision tower in another. `llava-hf`: one
    folder of transformers' LLaVA. `vicuna-clip`: Vicuna and CLIP, before any training.
    `open-clip`: Vicuna and an open_clip ViT."""
    template: TemplateName = "vicuna_v1"
    """The chat template that is saved with the model; training writes its own."""
    geometry: Geometry | None = None
    """What is done to images that are not square. Default: what the source says, else `pad`."""
    dtype: DtypeName | None = None
    """Of the weights on disk. Default: that of the source's language model."""
    feature_layer: int = -2
    """Hidden state of the tower that is projected, where the source has no projector."""
    seed: int = 0
    """Of a new projector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePaths:
    """Where a source lies on this machine."""

    source: Path
    """The folder of the language model, or of all of it."""
    vision_tower: Path | None = None
    """Folder of the tower. Default for `published`: `vision_tower` in the source, if there."""
    projector: Path | None = None
    """LLaVA's `mm_projector.bin`, where the source has no projector. Default: a new, random one."""

    def __post_init__(self) -> None:
        for path, exists in (
            (self.source, self.source.is_dir()),
            (self.vision_tower, self.vision_tower is None or self.vision_tower.is_dir()),
            (self.projector, self.projector is None or self.projector.is_file()),
        ):
            if not exists:
                raise ConfigError(
                    f"{path} does not exist; download it first and give its absolute path"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model as it was read; tensors are still in the source's files."""

    model: ModelConfig
    state: dict[str, Tensor]
    """Whole, under the names of `LlavaForConditionalGeneration`."""
    geometry: Geometry


def inputs_of(config: ImportConfig, paths: SourcePaths) -> dict[str, str]:
    """Return 16 hex digits for each place that is read: of the names and bytes of its files."""
    places = {
        "source": paths.source,
        "vision_tower": _tower_folder(config, paths),
        "projector": paths.projector,
    }
    return {name: _digest(place) for name, place in places.items() if place is not None}


def read_source(config: ImportConfig, paths: SourcePaths, *, name: str) -> Source:
    """Read a source and compare it with what its configs ask for.

    Args:
        config: of which kind it is.
        paths: where it lies.
        name: of the new model.

    Raises:
        ConfigError: paths are missing or too many, or a config asks for what we do not have.
        WeightsError: files are damaged, or keys missing, extra or misshapen.
    """
    if config.kind == "llava-hf":
        return _read_llava_hf(config, paths, name)
    return _read_parts(config, paths, name)


def write_model(source: Source, config: ImportConfig, paths: SourcePaths, folder: Path) -> str:
    """Write a model folder; return the `tower_sha256` of what was written.

    Raises:
        ConfigError: the source has no tokenizer.json.
        ContractError: its tokenizer is not of these weights.
    """
    dtype = config.dtype or str(source.state["lm_head.weight"].dtype).removeprefix("torch.")
    kind = weights.to_dtype(dtype)
    state = {name: value.to(kind) for name, value in source.state.items()}
    model = convert.blank(source.model)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        file.write_text(_tokenizer(paths.source, source.model), encoding="utf-8")
        save_processor(
            folder,
            config=source.model,
            tokenizer_file=file,
            chat_template=chat_template(config.template),
            geometry=source.geometry,
        )
    Conversation.open(folder, config.template)  # says now what training would say in an hour
    weights.save(model, folder, dtype=dtype, state=state)
    return convert.tower_sha256(state)


def _read_llava_hf(config: ImportConfig, paths: SourcePaths, name: str) -> Source:
    if paths.vision_tower or paths.projector:
        raise ConfigError("llava-hf has tower and projector; leave the other two paths out")
    model = published.read_llava_hf(paths.source, name=name)
    found = convert.drop_buffers(read_folder(paths.source))
    found = convert.with_vision_model(found, "vision_tower.")
    expected = convert.renamed(convert.blank(model).state_dict(), weights.LLAVA_HF)
    convert.check(found, expected, source=str(paths.source), advice=_AGAIN)
    pads = published.read_pixels(paths.source).get("do_pad", True)
    return Source(
        model=model,
        state=convert.renamed(found, convert.reverse(weights.LLAVA_HF)),
        geometry=config.geometry or ("pad" if pads else "square"),
    )


def _read_parts(config: ImportConfig, paths: SourcePaths, name: str) -> Source:
    """Read a language model, a tower and a projector, each from where it is."""
    source, is_llava = paths.source, config.kind == "published"
    layer, geometry, width, hint = config.feature_layer, "pad", None, ""
    if is_llava:
        text, fields = published.read_llava(source)
        layer, width = fields["mm_vision_select_layer"], fields.get("mm_hidden_size")
        geometry = fields.get("image_aspect_ratio", "square")
        hint = f"the config points at {fields.get('mm_vision_tower')!r}"
    else:
        text = published.read_llama(source)
    tower = _tower_folder(config, paths)
    if tower is None:
        raise ConfigError(
            f"{source} comes without a vision tower ({hint or 'a language model alone'}); download "
            "the tower and give --vision-tower PATH"
        )
    vision, pixels = _vision(config, tower)
    if width not in (None, vision.hidden_size):
        raise ConfigError(
            f"{source}: mm_hidden_size is {width}, but the tower {tower} is "
            f"{vision.hidden_size} wide; {hint}, give that one"
        )
    model = published.model_config(
        name, text, vision, pixels=pixels, feature_layer=layer, where=source / "config.json"
    )
    state = _state(config, paths, tower, model)
    return Source(
        model=model,
        state=convert.pad_rows(state, model),
        geometry=config.geometry or ("pad" if geometry == "pad" else "square"),
    )


def _state(
    config: ImportConfig, paths: SourcePaths, tower: Path, model: ModelConfig
) -> dict[str, Tensor]:
    """Return the parts' tensors under our names, embedding and head still without new rows."""
    blank = convert.cut_rows(convert.blank(model).state_dict(), model)
    found = convert.drop_buffers(read_folder(paths.source))
    is_llava, table = config.kind == "published", convert.LANGUAGE
    if is_llava and paths.projector is None:
        table = convert.PROJECTOR + table
    ((_, inside),) = convert.TOWER_INSIDE
    has_tower = is_llava and any(name.startswith(inside) for name in found)
    if has_tower:
        _refuse_two_towers(paths.source, tower)
        table = convert.TOWER_INSIDE + table
    advice = _AGAIN if paths.projector is None else f"{_AGAIN} If it has one, leave --projector out"
    convert.check(found, convert.renamed(blank, table), source=str(paths.source), advice=advice)
    state = convert.renamed(found, convert.reverse(table))
    if not has_tower:
        state |= _tower(config, tower, blank)
    if convert.PROJECTOR[0] not in table:
        state |= _projector(config, paths.projector, model, blank)
    return state


def _vision(config: ImportConfig, tower: Path) -> tuple[CLIPVisionConfig, Mapping[str, Any]]:
    """Return the shape of the tower, and mean and deviation of its pixels."""
    if config.kind != "open-clip":
        return published.read_clip(tower), published.read_pixels(tower)
    file = tower / open_clip.CONFIG
    fields = read_json(file)
    pixels = fields.get("preprocess_cfg", {})
    if not {"mean", "std"} <= set(pixels):
        raise ConfigError(f"{file}: preprocess_cfg has no mean and std; copy the model's own file")
    vision = open_clip.vision_config(fields, where=str(file))
    return vision, {"image_mean": pixels["mean"], "image_std": pixels["std"]}


def _tower(config: ImportConfig, tower: Path, blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    expected = convert.renamed(blank, convert.TOWER)
    if config.kind == "open-clip":
        found = open_clip.drop_text(read_folder(tower, open_clip.WEIGHTS))
        expected = open_clip.from_clip(expected)
    else:
        found = convert.drop_text_tower(convert.drop_buffers(read_folder(tower)))
        found = convert.with_vision_model(found)
    convert.check(found, expected, source=str(tower), advice=_AGAIN)
    if config.kind == "open-clip":
        found = open_clip.to_clip(found)
    return convert.renamed(found, convert.reverse(convert.TOWER))


def _projector(
    config: ImportConfig, file: Path | None, model: ModelConfig, blank: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if file is None:
        return convert.new_projector(model, seed=config.seed)
    # LLaVA itself matches any name with `mm_projector.` in it.
    found = {f"model.{name.removeprefix('model.')}": one for name, one in read_file(file).items()}
    advice = (
        f"A projector goes from {model.vision_width} to {model.text_width} to {model.text_width}; "
        "those of 7B and of 13B differ. Give the one that was trained for this language model"
    )
    expected = convert.renamed(blank, convert.PROJECTOR)
    convert.check(found, expected, source=str(file), advice=advice)
    return convert.renamed(found, convert.reverse(convert.PROJECTOR))


def _refuse_two_towers(source: Path, tower: Path) -> None:
    if has_weights(tower):
        raise WeightsError(
            f"{source} has a vision tower of its own, and {tower} has another: which is meant? To "
            "use the first, give a folder that has only config.json and preprocessor_config.json"
        )


def _tower_folder(config: ImportConfig, paths: SourcePaths) -> Path | None:
    beside = paths.source / TOWER_FOLDER
    if paths.vision_tower is None and config.kind == "published" and beside.is_dir():
        return beside
    return paths.vision_tower


def _tokenizer(folder: Path, model: ModelConfig) -> str:
    """Return a source's tokenizer.json with `<image>` and `<pad>`."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json. If it has tokenizer.model, convert that once: python "
            f'-c "from transformers import LlamaTokenizerFast as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    tokenizer = Tokenizer.from_file(str(file))
    for token, number in (("<image>", model.image_token_id), ("<pad>", model.pad_token_id)):
        if tokenizer.token_to_id(token) is not None:
            continue  # save_processor compares its id
        if (size := tokenizer.get_vocab_size()) != number:
            raise ConfigError(
                f"{file} has {size} tokens, so {token} would be number {size}; these weights have "
                f"it at {number}. Copy the tokenizer that belongs to them"
            )
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return str(tokenizer.to_str())


def _digest(place: Path) -> str:
    files = [place] if place.is_file() else sorted(place.iterdir())
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and file.suffix in _READ:
            digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()[:16]
