"""Training of LoRA kinds: what cannot be had together, exact resume, the plan, and a start from another LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd3_lora.plan.step_memory import StepShape, simulate_step
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.training.config import TrainingFlags
from sd3_lora.transformer.lora import LORA_FILE, LoraKind, attach_lora, plain_tensors, save_lora, target_modules

import pytest
import torch
from conftest import Prepared
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from test_resume import Interrupted, assert_same_run, interrupt
from training_runs import Script, same_lora, train, training_script


@pytest.fixture
def transformer(tiny_sd3: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer")


def attach(transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    """Of rank 4, as if it had been trained."""
    attach_lora(transformer, target_modules(transformer, None, None), 4, 12.0, 0.0, 0, kind)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


REFUSED: list[tuple[list[Any], str]] = [
    (["--use_dora", "--stream_blocks", 1], "--use_dora reads whole weights on the device, and --stream_blocks 1"),
    (["--init_lora_weights", "pissa", "--stream_blocks", 2], "--init_lora_weights pissa reads whole weights"),
    (["--init_lora_weights", "olora", "--stream_blocks", 1], "--init_lora_weights olora reads whole weights"),
    (["--init_lora_weights", "pissa", "--base_precision", "nf4"], "and --base_precision nf4 may keep them in 4 bits"),
    (["--init_lora_weights", "olora", "--base_precision", "auto"], "olora decomposes the exact weights, and --base_pr"),
    (["--init_lora_weights", "pissa", "--use_dora"], "pissa and --use_dora are two kinds of LoRA: leave one out"),
    (["--init_lora_weights", "pissa", "--lora_dropout", 0.1], "would drop a part of the model itself: leave one out"),
    (["--init_lora_weights", "olora", "--init_lora", "x"], "olora and --init_lora are two ways to start"),
    (["--init_lora_weights", "loftq"], "argument --init_lora_weights: invalid choice: 'loftq'"),
    (["--init_lora_weights", "pissa", "--rank", 40], "has a rank of 32, less than 40: type a lower --rank"),
    (["--rank_pattern", "attn.to_k"], "--rank_pattern attn.to_k cannot be read: type for example attn.to_q=8"),
    (["--rank_pattern", "attn.to_k=0"], "--rank_pattern attn.to_k=0 cannot be read"),
    (["--rank_pattern", "ff.net.2=4"], "--rank_pattern ff.net.2=4: the layers with a LoRA are attn.add_k_proj"),
    (["--lora_layers", "second_attention"], "--lora_layers second_attention is in no block"),
    (["--lora_blocks", "middle"], "--lora_blocks middle is not a list of numbers"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=[" ".join(map(str, words)) for words, _ in REFUSED])
def test_what_cannot_be_had_together(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str
) -> None:
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert says in run.error
    assert run.wrote_no_weights()


@pytest.mark.parametrize("words", [["--use_dora"], ["--init_lora_weights", "pissa"], ["--rank_pattern", "attn.to_k=2"]])
def test_exact_resume(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[Any]
) -> None:
    """And the same bits with every block recomputed."""
    words = [*words, "--max_train_steps", 6, "--checkpointing_steps", 3, "--learning_rate", 0.01]
    whole = train(script, prepared, tmp_path / "whole", *words)
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(Interrupted):
            train(script, prepared, folder, *words)
    train(script, prepared, folder, *words, "--resume_from_checkpoint", "latest")
    assert_same_run(whole.folder, folder, 6)
    recomputed = train(script, prepared, tmp_path / "recomputed", *words, "--recompute_blocks", 2)
    assert same_lora(whole.folder / LORA_FILE, recomputed.folder / LORA_FILE)


def test_a_dora_on_4_bits(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Its first loss is the base's, and it learns."""
    words = ["--base_precision", "nf4", "--learning_rate", 0.01]
    plain = train(script, prepared, tmp_path / "plain", *words)
    dora = train(script, prepared, tmp_path / "dora", *words, "--use_dora")
    assert dora.losses[0]["loss"] == plain.losses[0]["loss"]
    assert dora.losses[1]["loss"] != plain.losses[1]["loss"]


def test_the_plan_counts_them(miniature_files: Any) -> None:
    """A DoRA keeps outputs for backward; a subtracted start is there beside what is trained, and in each product."""
    module, config = training_script(), miniature_files.read_config("transformer")

    def task_of(*words: str) -> Any:
        flags = TrainingFlags(*module.COMMAND_LINE.parse(list(words)))
        return module.training_task(flags, miniature_files, Buckets.square(64), torch.float16, torch.device("cpu"), 1)

    plain, dora, pissa = task_of(), task_of("--use_dora"), task_of("--init_lora_weights", "pissa")
    assert (plain.can_stream, dora.can_stream, pissa.can_stream) == (True, False, False)
    assert (plain.can_be_4bit, dora.can_be_4bit, pissa.can_be_4bit) == (True, True, False)
    assert pissa.shape.bytes_per_parameter - plain.shape.bytes_per_parameter == 4

    def simulated(shape: StepShape) -> Any:
        return simulate_step(config, shape, None, plain.step)

    of_plain, of_dora, of_pissa = (simulated(task.shape) for task in (plain, dora, pissa))
    assert all(mine > other for mine, other in zip(of_dora.kept, of_plain.kept, strict=True))
    assert sum(of_pissa.kept) > sum(of_plain.kept)
    assert of_pissa.lora == of_plain.lora < of_dora.lora
    larger = task_of("--rank_pattern", "attn.to_k=64")
    assert simulated(larger.shape).lora > of_plain.lora


# A start from another LoRA


def onetrainer_file(path: Path, transformer: SD3Transformer2DModel) -> Path:
    """Two layers with alpha 2, and their names, as OneTrainer writes them."""
    tensors = {}
    for name, tensor in plain_tensors(transformer).items():
        if ".0.attn.to_k." in name or ".1.attn.to_v." in name:
            layer, part = name.removesuffix(".weight").rsplit(".", 1)
            own = f"lora_transformer_{layer.replace('.', '_')}"
            tensors[f"{own}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
            tensors[f"{own}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def test_training_begins_with_it(
    script: Script, prepared: Prepared, transformer: SD3Transformer2DModel, tmp_path: Path
) -> None:
    """With hardly a rate the LoRA is the file's, and what that lacks begins at zero. It resumes without the file."""
    attach(transformer, LoraKind())
    path = onetrainer_file(tmp_path / "other.safetensors", transformer)
    words = ["--init_lora", path, "--learning_rate", 1e-12, "--checkpointing_steps", 2]
    run = train(script, prepared, tmp_path / "out", *words)
    tensors = run.lora
    for name, tensor in plain_tensors(transformer).items():
        mine = tensors[f"transformer.{name}"]
        if ".0.attn.to_k." in name or ".1.attn.to_v." in name:
            torch.testing.assert_close(mine, tensor * (0.5 if "lora_B" in name else 1), atol=1e-6, rtol=1e-5)
        elif "lora_B" in name:
            assert mine.abs().max() < 1e-9
    plain = train(script, prepared, tmp_path / "plain")
    assert run.losses[0]["loss"] != plain.losses[0]["loss"]
    path.unlink()
    longer = [*words, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    assert "step 3 of 4" in train(script, prepared, tmp_path / "out", *longer).out
    without = train(script, prepared, tmp_path / "out", *longer[2:], code=2)
    assert f"was trained with --init_lora {path}: type --init_lora {path} to go on" in without.error


def test_what_does_not_fit_is_named(
    script: Script, prepared: Prepared, transformer: SD3Transformer2DModel, tmp_path: Path
) -> None:
    attach(transformer, LoraKind(use_dora=True))
    save_lora(tmp_path, transformer, {})
    path = tmp_path / LORA_FILE

    def refusal(*words: Any) -> str:
        run = train(script, prepared, tmp_path / "out", "--init_lora", path, *words, code=2)
        assert run.wrote_no_weights()
        return run.error

    layer = "transformer_blocks.0.attn.add_k_proj"
    assert refusal() == f"--init_lora {path} is a DoRA: add --use_dora"
    assert f"has a rank of 4 on {layer}, and this command 2: type --rank 4" in refusal("--use_dora", "--rank", 2)
    said = refusal("--use_dora", "--lora_layers", "ff.net.2")
    assert f"has a LoRA on {layer}, which this command does not train: type --lora_layers attn.add_k_proj," in said
    layers = said.split("--lora_layers ")[1].split()[0]
    train(script, prepared, tmp_path / "fits", "--init_lora", path, "--use_dora", "--lora_layers", layers)
    assert "which this command does not train" in refusal("--use_dora", "--lora_blocks", 1)
    path.unlink()
    assert refusal("--use_dora") == f"--init_lora {path}: there is no such file: check the path"
    outside = {
        f"transformer.proj_out.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (1, 32)), ("B", (64, 1)))
    }
    save_file(outside, path)
    assert "has a LoRA on proj_out, which is not trained here: begin with another" in refusal()
