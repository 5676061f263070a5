"""Files that lie, hold code, or name other places: one sentence each, nothing executed, nothing written elsewhere.

hypothesis draws the lies: a few in `make test`, always the same; under the marker `faults` HOSTILE_EXAMPLES of each
artefact (400 unless it says otherwise).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.single_file import SingleFile
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training.loss_log import LoggedStep, keep_lines
from sd3_lora.transformer.lora_files import read_lora_file

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT, PROMPT, TRAINING_SCRIPT, Prepared, Result, save_pictures
from hostile_files import make_lie, without_checksums
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from original_sd3 import random_original
from safetensors import safe_open
from safetensors.torch import save_file
from test_bit_flips import ARTEFACTS, PROVENANCE, latent_cache

MINIATURE = PROJECT / "miniature"
TRANSFORMER = json.loads((MINIATURE / "transformer" / "config.json").read_text())


def make_foreign_lora(folder: Path) -> Path:
    """In kohya's way, with alphas."""
    tensors, width = {}, TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    for name in ("attn.to_q", "attn.to_k"):
        layer = f"transformer.transformer_blocks.0.{name}"
        tensors |= {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, folder / "lora.safetensors", {"sd3_lora": json.dumps({"rank": 2, "trigger": "a dog"})})
    return folder / "lora.safetensors"


def make_adapter_config(folder: Path) -> Path:
    """PEFT's, beside its file."""
    make_foreign_lora(folder).rename(folder / "adapter_model.safetensors")
    values = {"r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {"to_q": 8}, "peft_type": "LORA"}
    values |= {"use_dora": False, "use_rslora": False, "target_modules": ["to_q", "to_k"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder / "adapter_config.json"


def read_loras(path: Path) -> Any:
    lora = read_lora_file(path, TRANSFORMER)
    return lora.layers, lora.device_bytes, lora.identity()


def read_adapter(path: Path) -> Any:
    return read_loras(path.with_name("adapter_model.safetensors"))


def make_single(folder: Path) -> Path:
    save_file(random_original(small(TRANSFORMER)), folder / "base.safetensors")
    return folder / "base.safetensors"


def small(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"num_layers": 1, "num_attention_heads": 1, "pos_embed_max_size": 4}


def read_single(path: Path) -> Any:
    file = SingleFile(path)
    return file.tensors("transformer", file.transformer_config(TRANSFORMER))


def make_config(component: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / component).mkdir()
        shutil.copy(MINIATURE / "model_index.json", folder)
        for path in (MINIATURE / component).iterdir():
            target = folder / component / path.name
            shutil.copy(path, target) if path.suffix == ".json" else os.link(path, target)
        return folder / component / "config.json"

    return make


def read_component(path: Path) -> Any:
    return ModelFiles(ModelConfig(str(path.parent.parent))).component(path.parent.name)


def read_rows(path: Path) -> Any:
    """With all that is asked of an open file."""
    read = ARTEFACTS["embeddings"][1](path)
    with EmbeddingStore(path) as store:
        asked = (store.uncaptioned_prompts, store.prompts_of_images(), store.joint_width, store.pooled_width)
        made_with = store.provenance
    return read, asked, made_with.difference(PROVENANCE, "size"), made_with.identity, made_with.other_identities


def read_crops(path: Path) -> Any:
    cache, image_id = latent_cache(path.parent), path.stem
    look = cache.look(image_id)
    assert look is not None
    return [cache.read(image_id, name) for name in look.variants], cache.source(image_id), cache.tiles(image_id)


def read_lines(path: Path) -> Any:
    """Lines of earlier builds may lack a field."""
    return [[line.get(each.name) for each in fields(LoggedStep)] for line in keep_lines(path, 3)]


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    **{name: pair for name, pair in ARTEFACTS.items() if name != "LoRA"},
    "embeddings": (ARTEFACTS["embeddings"][0], read_rows),
    "latents": (ARTEFACTS["latents"][0], read_crops),
    "losses": (ARTEFACTS["losses"][0], read_lines),
    "LoRA": (make_foreign_lora, read_loras),
    "PEFT's configuration": (make_adapter_config, read_adapter),
    "a base in one file": (make_single, read_single),
    **{
        f"config.json of {name}": (make_config(name), read_component) for name in ("text_encoder", "vae", "transformer")
    },
}


def require_a_sentence(kind: str, draw: Random) -> None:
    make, read = KINDS[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "w"
        folder.mkdir()
        path = make(folder)
        make_lie(path, draw)
        try:
            read(path)
        except UserError as error:
            text = str(error)
            assert kind in ("record", "pictures") or "\n" not in text, text
        assert [each.name for each in Path(name).iterdir()] == ["w"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_lies_is_one_sentence(kind: str) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    @given(st.randoms(use_true_random=False))
    def lie(draw: Random) -> None:
        require_a_sentence(kind, draw)

    lie()


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_many_files_that_lie_are_one_sentence_each(kind: str) -> None:
    examples = int(os.environ.get("HOSTILE_EXAMPLES", "400"))

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(st.randoms(use_true_random=True))
    def lie(draw: Random) -> None:
        require_a_sentence(kind, draw)

    lie()


# What was found


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes our metadata of a safetensors file."""
    without_checksums(path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = json.loads(header["__metadata__"]["sd3_lora"])
    edit(metadata)
    header["__metadata__"]["sd3_lora"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata: metadata.pop("picture_size"),
        lambda metadata: metadata.update(picture_size=[1]),
        lambda metadata: metadata.update(picture_size=["x", None]),
        lambda metadata: metadata.update(tiles_px=[1]),
        lambda metadata: metadata["provenance"].update(config_hash=7),
        lambda metadata: metadata["provenance"].update(revision=[7]),
        lambda metadata: metadata["provenance"].update(size="x"),
        lambda metadata: metadata.update(provenance=[7]),
    ],
)
def test_latents_with_other_metadata(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = KINDS["latents"][0](tmp_path)
    edit_header(path, edit)
    with pytest.raises(UserError, match="is not a whole latent file of this project") as caught:
        read_crops(path)
    assert str(path) in str(caught.value)


def test_latents_without_their_deviations(tmp_path: Path) -> None:
    path = KINDS["latents"][0](tmp_path)
    with safe_open(path, "pt") as handle:
        metadata = {name: text for name, text in handle.metadata().items() if name == "sd3_lora"}
        tensors = {name: handle.get_tensor(name) for name in handle.keys() if "std" not in name}  # noqa: SIM118
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"lacks 0,0,64,64\.std: delete it and run precompute_latents\.py again"):
        read_crops(path)


@pytest.mark.parametrize("prompts", [0.5, "a", ["a", "b"], [7], []])
def test_a_part_of_embeddings_with_other_prompts_is_made_again(tmp_path: Path, prompts: Any) -> None:
    path = KINDS["part of embeddings"][0](tmp_path)
    edit_header(path, lambda metadata: metadata.update(prompts=prompts))
    with pytest.raises(UserError, match="is encoded again"):
        KINDS["part of embeddings"][1](path)
    assert not path.exists()


def test_a_lora_of_seventy_dimensions(tmp_path: Path) -> None:
    """safetensors opens it, and torch has no such tensor."""
    path = KINDS["LoRA"][0](tmp_path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    name = next(name for name in header if name.endswith("alpha"))
    header[name]["shape"] = [1] * 70
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    with pytest.raises(UserError, match=f"{name} has 70 dimensions, as no LoRA has"):
        read_loras(path)


@pytest.mark.parametrize("change", ["null prompt", "numbers for roles", "other list", "negative shape", "no roles"])
def test_embeddings_with_other_columns(tmp_path: Path, change: str) -> None:
    path = KINDS["embeddings"][0](tmp_path)
    without_checksums(path)
    table = pq.read_table(path)
    names, rows = table.column_names, len(table)
    if change == "negative shape":
        text = table.schema.metadata[b"sd3_lora"].replace(
            b'"prompt_embeds_shape": [6, 8]', b'"prompt_embeds_shape": [-6, -8]'
        )
        table = table.replace_schema_metadata({b"sd3_lora": text})
    elif change == "no roles":
        table = table.drop_columns(["roles"])
    else:
        name, column = {
            "null prompt": ("prompt", pa.array([None] * rows, pa.string())),
            "numbers for roles": ("roles", pa.array([7] * rows)),
            "other list": ("pooled_prompt_embeds", pa.array([[1.0]] * rows, pa.list_(pa.float16()))),
        }[change]
        table = table.set_column(names.index(name), name, column)
    pq.write_table(table, path, row_group_size=1)
    with pytest.raises(UserError, match="is not a whole embeddings file of this project") as caught:
        EmbeddingStore(path)
    assert str(path) in str(caught.value)


# Code where weights are expected


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def without_weights(prepared: Prepared, folder: Path) -> Path:
    return Path(shutil.copytree(prepared.model, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("flag", ["--lora", "--init_lora", "--identifier_embedding", "base", "component"])
def test_a_pickle_is_not_read(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, flag: str, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    base = ["--pretrained_model_name_or_path", prepared.model]
    drawing = ["--prompt", PROMPT, "--outdir", tmp_path / "out", "--data_df_path", prepared.embeddings]
    if flag == "base":
        base[1] = path
    if flag == "component":
        base[1] = without_weights(prepared, tmp_path / "model")
        path = base[1] / "transformer" / f"diffusion_pytorch_model{suffix}"
        shutil.move(tmp_path / f"weights{suffix}", path)
    if flag == "--init_lora":
        training = [*prepared.flags, "--output_dir", tmp_path / "out", "--max_train_steps", 1]
        result = script(TRAINING_SCRIPT, *training, flag, path, "--device", "cpu")
    else:
        words = [flag, path] if flag.startswith("--") else []
        result = script("inference", *base, *drawing, *words, "--device", "cpu")
    assert result.code == 2
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 1, result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "ran").exists()


def test_code_in_a_model_s_folder_is_not_run(script: Callable[..., Result], prepared: Prepared, tmp_path: Path) -> None:
    """Named in every configuration that it has, and lying where diffusers and transformers look for it."""
    model = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Any_: pass\n"
    named = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor"), "code.Any_")
    for path in [*model.rglob("config.json"), *model.rglob("tokenizer_config.json")]:
        (path.parent / "code.py").write_text(code)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": named}))
    (model / "pipeline.py").write_text(code)
    flags = ["--pretrained_model_name_or_path", model, "--prompt", PROMPT, "--num_steps", 1, "--device", "cpu"]
    result = script("inference", *flags, "--outdir", tmp_path / "out", "--data_df_path", tmp_path / "none.parquet")
    assert result.code == 0, result.err
    assert not (tmp_path / "ran").exists()


# Names that leave a folder

ESCAPES = ["../../x", "/tmp/../x/y", "..", "a/../../b", "..\\..\\x", "CON", "x" * 400, "\u202e../x", "~/x", "$HOME/x"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_prompt_is_no_path(script: Callable[..., Result], prepared: Prepared, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "one" / "two" / "out"
    flags = ["--pretrained_model_name_or_path", prepared.model, "--num_steps", 1, "--device", "cpu"]
    flags += ["--data_df_path", tmp_path / "one" / "two" / "none.parquet", "--height", 64, "--width", 64]
    result = script("inference", *flags, "--prompt", name, "--outdir", folder)
    assert result.code == 0, result.err
    drawn = list(tmp_path.rglob("*.png"))
    assert drawn
    assert all(path.resolve().is_relative_to(folder) for path in drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("name", ["../../outside.png", "/etc/hostname", "..", "a/../../outside.png"])
def test_a_file_name_of_the_metadata_stays_in_its_folder(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "pictures" / "inner"
    save_pictures(folder, [(64, 64)])
    save_pictures(tmp_path, [(64, 64)])
    (tmp_path / "00.png").rename(tmp_path / "outside.png")
    rows = [{"file_name": each, "text": f"caption of {each}"} for each in ("00.png", name)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--pretrained_model_name_or_path", prepared.model, "--instance_data_dir", folder, "--device", "cpu"]
    result = script("compute_embeddings", *flags, "--output_path", tmp_path / "e.parquet", "--max_sequence_length", 20)
    if result.code == 0:
        with EmbeddingStore(tmp_path / "e.parquet") as store:
            assert f"caption of {name}" not in store.prompts_with_role("instance")
    else:
        assert result.code == 2
        assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 1, result.err


@pytest.mark.parametrize("name", ["../../x", "..", "a/../../../x"])
def test_the_log_s_folder_stays_in_the_output(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "one" / "out"
    words = [*prepared.flags, "--output_dir", folder, "--max_train_steps", 1, "--logging_dir", name]
    result = script(TRAINING_SCRIPT, *words)
    assert result.code == 2
    assert "leaves the output folder" in result.err
    assert not (tmp_path / "one").exists()
