"""`python -m sd3_lora.merge`: a whole model that draws as the base and its LoRA do, or nothing."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import sd3_lora.merge
import sd3_lora.transformer.merged_weights

import numpy as np
import pytest
import torch
from conftest import PROMPT, Prepared, Result
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import train

Script = Callable[..., Result]
MERGE = "sd3_lora.merge"
KINDS = {
    "LoRA": ["--lora_alpha", 6, "--rank_pattern", "attn.to_k=2"],
    "DoRA": ["--use_dora"],
    "LoKr": ["--lora_type", "lokr", "--lora_alpha", 6],
    "LoHa": ["--lora_type", "loha", "--rank", 2],
    "all layers": ["--lora_layers", "attention+mlp"],
}


def draw(script: Script, prepared: Prepared, outdir: Path, *words: object) -> np.ndarray:
    flags = ["--data_df_path", prepared.embeddings, "--outdir", outdir, "--num_steps", 3, "--guidance", 2]
    result = script("inference", *flags, *words)
    assert result.code == 0, result.err
    (path,) = outdir.glob("*/*.png")
    return np.asarray(Image.open(path)).astype(int)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def model_of(prepared: Prepared) -> list[object]:
    return ["--prompt", PROMPT, "--max_sequence_length", 20, "--pretrained_model_name_or_path", prepared.model]


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_draws_the_same(script: Script, prepared: Prepared, tmp_path: Path, kind: str) -> None:
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    train(script, prepared, lora, "--learning_rate", 0.05, *KINDS[kind])
    result = script(MERGE, lora, "--output_dir", merged)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == f"wrote {merged}"
    with_lora = draw(script, prepared, tmp_path / "with", *model_of(prepared), "--lora", lora)
    (command,) = (line for line in result.out.splitlines() if line.startswith("next: "))
    words = shlex.split(command)[3:]
    assert words[words.index("--prompt") + 1] == PROMPT
    as_one = draw(script, prepared, tmp_path / "one", *words)
    assert np.abs(as_one - with_lora).max() <= 1
    assert np.abs(draw(script, prepared, tmp_path / "base", *model_of(prepared)) - with_lora).mean() > 1
    StableDiffusion3Pipeline.from_pretrained(merged)


def test_what_is_written(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """The same files; weights outside the transformer are links, or copies; other tensors keep their bits."""
    lora = tmp_path / "lora"
    train(script, prepared, lora, "--learning_rate", 0.05, "--lora_layers", "attn.to_q")
    for name, words in (("linked", []), ("copied", ["--copy"])):
        assert script(MERGE, lora, "--output_dir", tmp_path / name, *words).code == 0
        files = files_of(prepared.model)
        assert files_of(tmp_path / name) == files
        for file in files:
            is_link = (tmp_path / name / file).samefile(prepared.model / file)
            is_weight = file.endswith(".safetensors") and not file.startswith("transformer/")
            assert is_link == (is_weight and name == "linked"), file
            if not file.startswith("transformer/diffusion"):
                assert (tmp_path / name / file).read_bytes() == (prepared.model / file).read_bytes()
    (path,) = (prepared.model / "transformer").glob("*.safetensors")
    before, after = load_file(path), load_file(tmp_path / "linked" / "transformer" / path.name)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"transformer_blocks.{block}.attn.to_q.weight" for block in (0, 1)}
    result = script(MERGE, lora, "--output_dir", tmp_path / "linked")
    assert result.code == 2
    assert result.err == f"error: {tmp_path / 'linked'} is there already: give another --output_dir\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_of_16_bits(script: Script, prepared: Prepared, tmp_path: Path, dtype: torch.dtype) -> None:
    """Each weight is W + s B A in float32, rounded once; the shards and their list stay as they are."""
    model = tmp_path / "model"
    shutil.copytree(prepared.model, model)
    shutil.rmtree(model / "transformer")
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer", torch_dtype=dtype)
    transformer.save_pretrained(model / "transformer", max_shard_size="40KB")
    name = "transformer_blocks.1.ff.net.0.proj"
    weight = transformer.get_submodule(name).weight.detach()
    down, up = torch.randn(3, weight.shape[1]), torch.randn(len(weight), 3)
    tensors = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    words = [tmp_path / "lora.safetensors", "--output_dir", tmp_path / "merged", "--lora_scale", 0.5]
    assert script(MERGE, *words, "--pretrained_model_name_or_path", model).code == 0
    assert len(list((tmp_path / "merged" / "transformer").glob("*.safetensors"))) > 2
    merged = SD3Transformer2DModel.from_pretrained(tmp_path / "merged" / "transformer", torch_dtype="auto")
    expected = (weight.float() + 0.5 * up @ down).to(dtype)
    assert torch.equal(merged.get_submodule(name).weight, expected)


def test_an_attempt_that_fails_leaves_nothing(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = tmp_path / "lora"
    train(script, prepared, lora)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(sd3_lora.transformer.merged_weights, "_write_file", full)
    result = script(MERGE, lora, "--output_dir", tmp_path / "merged")
    assert result.code == 2
    assert result.err == "error: the disk is full: free some space and type the same command again\n"
    assert [path.name for path in tmp_path.iterdir() if path != lora and any(path.iterdir())] == []
    monkeypatch.undo()
    assert script(MERGE, lora, "--output_dir", tmp_path / "merged").code == 0


def test_a_dora_has_one_strength(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path / "lora", "--use_dora")
    result = script(MERGE, tmp_path / "lora", "--output_dir", tmp_path / "merged", "--lora_scale", 0.5)
    assert result.code == 2
    assert "is a DoRA, which has one strength: leave out --lora_scale 0.5" in result.err
    assert not (tmp_path / "merged").exists()
