# SPDX-License-Identifier: Apache-2.0
"""Small random weights in the layouts of others, under the true names; and the two jobs on them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from jobs import export_weights, import_weights
from jobs.export_weights import ExportJob
from jobs.import_weights import ImportJob
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.where import Where
from sg4v_ray.model.importing import ImportConfig, SourcePaths

State = dict[str, Tensor]
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu",
}  # fmt: skip
PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3]}
LLAVA = {
    "model_type": "share4v", "mm_hidden_size": 24, "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_vision_tower": "Lin-Chen/some-tower",
    "image_aspect_ratio": "pad",
}  # fmt: skip


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def _tokenizer(folder: Path) -> int:
    """Write a tokenizer with `<unk>`, `<s>`, `</s>` at 0, 1, 2; return how many tokens it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a red circle on a pale background"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


def randomised(state: State) -> State:
    return {name: torch.randn(value.shape) for name, value in state.items()}


def write_vicuna(folder: Path) -> State:
    rows = _tokenizer(folder)
    write(folder / "config.json", {**TEXT, "model_type": "llama", "vocab_size": rows})
    state = randomised(LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=rows)).state_dict())
    save_file(state, folder / "model.safetensors")
    return state


def write_clip(folder: Path) -> State:
    write(folder / "config.json", {**VISION, "model_type": "clip_vision_model"})
    write(folder / "preprocessor_config.json", PIXELS)
    state = randomised(CLIPVisionModel(CLIPVisionConfig(**VISION)).state_dict())
    state = {f"vision_model.{name}": value for name, value in state.items()}
    save_file(state, folder / "model.safetensors")
    return state


def projector(width: int = 32) -> State:
    return {
        "model.mm_projector.0.weight": torch.randn(width, 24),
        "model.mm_projector.0.bias": torch.randn(width),
        "model.mm_projector.2.weight": torch.randn(width, width),
        "model.mm_projector.2.bias": torch.randn(width),
    }


def write_published(folder: Path) -> tuple[State, State]:
    """Write a language model with projector, and the tower in `vision_tower`."""
    state = write_vicuna(folder) | projector()
    save_file(state, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", fields | LLAVA)
    return state, write_clip(folder / "vision_tower")


def in_shards(folder: Path, state: State, *, kind: str = "bin") -> None:
    """Replace a folder's weights by two shards and their index."""
    (folder / "model.safetensors").unlink()
    stem = "pytorch_model" if kind == "bin" else "model"
    names, places = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = folder / f"{stem}-{number:05d}-of-00002.{kind}"
        tensors = {name: state[name] for name in part}
        if kind == "bin":
            torch.save(tensors, file)
        else:
            save_file(tensors, file)
        places |= dict.fromkeys(part, file.name)
    write(folder / f"{stem}.{kind}.index.json", {"weight_map": places})


def _job(kind: Any, source: Path, root: Path, **paths: Path) -> ImportJob:
    return ImportJob(
        config=ImportConfig(kind=kind),
        paths=SourcePaths(source=source, **paths),
        where=Where(root=str(root)),
        out=Ref(name="tiny"),
    )


def run_import(kind: Any, source: Path, root: Path, **paths: Path) -> Path:
    """Run the import job; return the folder of the model."""
    import_weights.import_weights(_job(kind, source, root, **paths))
    return root / "tiny" / "v1" / "model"


def run_export(layout: Any, root: Path, to: Path) -> Path:
    where = Where(root=str(root))
    job = ExportJob(model="tiny@v1", layout=layout, to=to, where=where)
    export_weights.export_weights(job)
    return to


def assert_same(one: State, other: State) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
