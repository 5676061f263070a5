"""`python -m sd3_lora.export`, and `--export` in training: the file beside the LoRA, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE

import pytest
import torch
from conftest import PROJECT, PROMPT, Prepared
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import Script, train

EXPORT = "sd3_lora.export"
KOHYA, A1111 = LORA_FILE.replace(".", "_kohya."), LORA_FILE.replace(".", "_a1111.")


def names(path: Path) -> set[str]:
    """Of the layers and parts, such as x_block_attn_qkv.alpha."""
    return {key.split("_", 5)[-1] for key in load_file(path)}


def test_training_writes_the_exports(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Both formats, of the moving average too; and the command writes the same bytes."""
    run = train(script, prepared, tmp_path, "--export", "kohya", "--export", "a1111", "--use_ema")
    stems = [LORA_FILE, EMA_FILE]
    exports = [tmp_path / name.replace(".", f"_{form}.") for name in stems for form in ("kohya", "a1111")]
    assert [line for line in run.out.splitlines() if "_kohya" in line or "_a1111" in line] == [
        f"wrote {path}" for path in exports
    ]
    layers = {f"{stream}_attn_{layer}" for stream in ("x_block", "context_block") for layer in ("qkv", "proj")}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert names(tmp_path / KOHYA) == {f"{layer}.{part}" for layer in layers for part in parts}
    assert names(tmp_path / A1111) == {f"{layer}.{part}" for layer in layers for part in parts[:2]}
    with safe_open(tmp_path / KOHYA, "pt") as handle:
        assert handle.metadata()["modelspec.trigger_phrase"] == PROMPT
    result = script(EXPORT, tmp_path, "--output", tmp_path / "again" / "mine.safetensors")
    assert result.out == f"wrote {tmp_path / 'again' / 'mine.safetensors'}\n"
    assert (tmp_path / "again" / "mine.safetensors").read_bytes() == (tmp_path / KOHYA).read_bytes()


def test_a_run_that_is_at_its_end_is_exported(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path)
    assert not (tmp_path / KOHYA).exists()
    again = train(script, prepared, tmp_path, "--export", "kohya", "--resume_from_checkpoint", "latest")
    assert "nothing to do" in again.out
    assert len(load_file(tmp_path / KOHYA)) == 3 * len({key.split(".attn")[0] for key in run.lora}) * 4 - 3


def test_training_begins_with_an_export_as_with_the_lora(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path, "--learning_rate", 0.01, "--export", "kohya", "--export", "a1111")
    names = (LORA_FILE, KOHYA, A1111)
    runs = [train(script, prepared, tmp_path / f"from_{name}", "--init_lora", tmp_path / name) for name in names]
    assert runs[0].losses == runs[1].losses == runs[2].losses


@pytest.mark.parametrize("words", [["--use_dora"], ["--lora_type", "lokr"], ["--lora_type", "loha"]])
def test_other_kinds(script: Script, prepared: Prepared, tmp_path: Path, words: list[str]) -> None:
    """For A1111 they are refused before training; for ComfyUI and Forge they are whole differences."""
    run = train(script, prepared, tmp_path / "out", *words, "--export", "kohya,a1111", code=2)
    assert "A1111 reads plain LoRAs alone" in run.error
    assert f"`python -m sd3_lora.merge {tmp_path / 'out' / LORA_FILE} --output_dir merged`" in run.error
    assert run.wrote_no_weights()
    train(script, prepared, tmp_path / "out", *words, "--export", "kohya", "--lora_layers", "attn.to_q")
    assert names(tmp_path / "out" / KOHYA) == {"x_block_attn_qkv.diff"}


def test_the_command_as_it_is_typed(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, with the LoRA as the first argument; once in a process of its own."""
    transformer = load_file(next((prepared.model / "transformer").glob("*.safetensors")))
    width = len(transformer["transformer_blocks.0.attn.to_q.weight"])
    tensors = {f"transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.ones(width, 2) for part in "BA"}
    tensors = {name: tensor.T.contiguous() if "_A" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "foreign.safetensors")
    monkeypatch.chdir(tmp_path)

    def error(*words: str) -> str:
        result = script(EXPORT, *words)
        assert result.code == 2
        return result.err

    assert error("foreign.safetensors") == (
        "error: foreign.safetensors does not say its base model: add --pretrained_model_name_or_path\n"
    )
    assert error("nothing.safetensors") == (
        "error: --lora nothing.safetensors: there is no such file: check the path\n"
    )
    command = [sys.executable, "-m", EXPORT, "foreign.safetensors", "--format", "a1111"]
    command += ["--pretrained_model_name_or_path", str(prepared.model)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "wrote foreign_a1111.safetensors\n"), result.stderr
    assert len(load_file(tmp_path / "foreign_a1111.safetensors")) == 2
    assert error("--format", "a1111") == "error: the following arguments are required: --lora\n"


@pytest.mark.parametrize("words", [["--format", "comfyui"], ["--export", "kohya"]])
def test_flags_that_it_does_not_have(script: Script, tmp_path: Path, words: list[str]) -> None:
    result = script(EXPORT, tmp_path, *words)
    assert result.code == 2
    assert result.err.count("\n") == 1
