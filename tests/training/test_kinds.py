"""Training of LoRA kinds: what cannot be had together, exact resume, the plan, and a start from another LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd3_lora.plan.step_memory import StepShape, simulate_step
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.training.config import TrainingFlags
from sd3_lora.transformer.lora import (
    EMA_FILE,
    LORA_FILE,
    LoraKind,
    attach_lora,
    plain_tensors,
    save_lora,
    target_modules,
)
from sd3_lora.transformer.lora_files import read_lora_file

import pytest
import torch
from conftest import Prepared
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
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
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def attached(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    attach(transformer, LoraKind())
    return transformer


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
    (["--lora_type", "locon"], "argument --lora_type: invalid choice: 'locon'"),
    (["--lora_type", "lokr", "--use_dora"], "--use_dora is of a plain LoRA, not of --lora_type lokr: leave one out"),
    (["--lora_type", "loha", "--use_rslora"], "--use_rslora is of a plain LoRA, not of --lora_type loha: leave one"),
    (["--lora_type", "lokr", "--lora_dropout", 0.1], "--lora_dropout 0.1 is of a plain LoRA, not of --lora_type lokr"),
    (["--lora_type", "loha", "--init_lora_weights", "default"], "--init_lora_weights default is of a plain LoRA, not"),
    (["--lora_type", "lokr", "--init_lora_weights", "pissa"], "--init_lora_weights pissa is of a plain LoRA, not of"),
    (["--lokr_factor", 8], "--lokr_factor 8 is of --lora_type lokr: add that, or leave it out"),
    (
        ["--lora_type", "lokr", "--lokr_factor", 0],
        "--lokr_factor 0 must be at least 1, or -1 for about the square root",
    ),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=[" ".join(map(str, words)) for words, _ in REFUSED])
def test_what_cannot_be_had_together(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str
) -> None:
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert says in run.error
    assert run.wrote_no_weights()


RESUMED: list[list[Any]] = [
    ["--use_dora"],
    ["--init_lora_weights", "pissa"],
    ["--rank_pattern", "attn.to_k=2"],
    ["--lora_type", "lokr"],
    ["--lora_type", "lokr", "--lokr_factor", 2, "--rank_pattern", "attn.to_k=20", "--use_ema"],
    ["--lora_type", "loha", "--use_ema"],
]


@pytest.mark.parametrize("words", RESUMED, ids=[" ".join(map(str, words)) for words in RESUMED])
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


@pytest.mark.parametrize("type_", ["lokr", "loha"])
@pytest.mark.parametrize("words", [[], ["--base_precision", "nf4"]], ids=["16 bits", "nf4"])
def test_lycoris_on_a_streamed_base(
    script: Script, prepared: Prepared, tmp_path: Path, type_: str, words: list[Any]
) -> None:
    """The same bits; the first loss is the base's, and it learns."""
    words = [*words, "--learning_rate", 0.01]
    plain = train(script, prepared, tmp_path / "plain", *words)
    words += ["--lora_type", type_]
    resident = train(script, prepared, tmp_path / "resident", *words)
    streamed = train(script, prepared, tmp_path / "streamed", *words, "--stream_blocks", 2, "--recompute_blocks", 1)
    assert same_lora(resident.folder / LORA_FILE, streamed.folder / LORA_FILE)
    assert resident.losses[0]["loss"] == plain.losses[0]["loss"]
    assert resident.losses[1]["loss"] != plain.losses[1]["loss"]


@pytest.mark.parametrize("type_", ["lokr", "loha"])
def test_lycoris_is_drawn_as_trained(script: Script, prepared: Prepared, tmp_path: Path, type_: str) -> None:
    """By drawing's own loader, whose LoRAs have the base's dtype; the average too. The card names who reads it."""
    words = ["--lora_type", type_, "--learning_rate", 0.05, "--use_ema", "--rank_pattern", "attn.to_k=20"]
    run = train(script, prepared, tmp_path, *words)
    assert all(name.startswith("lycoris_transformer_blocks_") for name in run.lora)
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer")
    for name in (LORA_FILE, EMA_FILE):
        lora = read_lora_file(run.folder / name, transformer.config)
        assert (lora.type, lora.has_effect, lora.record["rank"]) == (type_, True, 4)
        assert lora.record["trigger"] in (run.folder / "README.md").read_text()
    card = (run.folder / "README.md").read_text()
    assert "ComfyUI" in card
    assert "load_lora_weights" not in card
    assert f"| {'LoKr' if type_ == 'lokr' else 'LoHa'} | rank 4" in card


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


def test_the_plan_counts_lycoris(miniature_files: Any) -> None:
    """Their numbers, and what they keep: less than a matrix `(out, in)` for each layer, which peft keeps."""
    module, config = training_script(), miniature_files.read_config("transformer")

    def simulated(*words: str) -> Any:
        flags = TrainingFlags(*module.COMMAND_LINE.parse(list(words)))
        device = torch.device("cpu")
        task = module.training_task(flags, miniature_files, Buckets.square(64), torch.float16, device, 1)
        assert task.can_stream
        assert task.can_be_4bit
        return simulate_step(config, task.shape, None, task.step)

    plain, loha = simulated(), simulated("--lora_type", "loha")
    assert loha.lora == 2 * plain.lora
    lokr, factored = simulated("--lora_type", "lokr"), simulated("--lora_type", "lokr", "--lokr_factor", "2")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    assert width == 256
    layers = plain.lora // 4 // (4 * 2 * width)  # all of them square
    assert lokr.lora == 4 * layers * (16 * 16 + 2 * 4 * 16)
    assert factored.lora == 4 * layers * (2 * 2 + 2 * 4 * 128)
    for each in (loha, lokr, factored):
        assert sum(plain.kept) < sum(each.kept) < sum(plain.kept) + layers * 2 * width * width


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


def test_lycoris_begins_with_its_like(
    script: Script, prepared: Prepared, transformer: SD3Transformer2DModel, tmp_path: Path
) -> None:
    """With hardly a rate it is the file's, and what that lacks begins at zero."""
    attach_lora(
        transformer, target_modules(transformer, ["attn.to_k"], None), 4, 12.0, 0.0, 0, LoraKind(type="lokr", factor=2)
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 if parameter.requires_grad else 0
    path = save_lora(tmp_path, transformer, {})
    words = ["--init_lora", path, "--learning_rate", 1e-12, "--lora_type", "lokr"]

    def refusal(*more: Any) -> str:
        return train(script, prepared, tmp_path / "out", *words, *more, code=2).error

    run = train(script, prepared, tmp_path / "fits", *words, "--lokr_factor", 2)
    tensors, before = run.lora, load_file(path)
    for name, tensor in tensors.items():
        if name in before:
            torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-5)
        elif name.endswith(("lokr_w2", "lokr_w2_b")):
            assert tensor.abs().max() < 1e-9
    layer = "transformer_blocks.0.attn.to_k"
    assert f"has lokr_w1 2×2, lokr_w2_a 16×4, lokr_w2_b 4×16 on {layer}, and this command lokr_w1 4×4, " in refusal()
    assert refusal().endswith("type the --rank and --lokr_factor that it was trained with")
    assert "and this command lokr_w1 2×2, lokr_w2 16×16: type the --rank" in refusal("--lokr_factor", 2, "--rank", 9)
    assert "which this command does not train" in refusal("--lokr_factor", 2, "--lora_blocks", 1)
    other = train(script, prepared, tmp_path / "out", *words[:2], code=2).error
    assert other == f"--init_lora {path} is a LoKr, and this command trains another kind: type --lora_type lokr"
    plain = save_lora(tmp_path, attached(SD3Transformer2DModel.from_config(transformer.config)), {})
    assert refusal("--lokr_factor", 2) == (
        f"--init_lora {plain} is a plain LoRA, and this command trains another kind: leave out --lora_type lokr"
    )


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
    # All that flags can mend is said at once.
    words = ["--rank", 2, "--lora_layers", "attn.to_q", "--lora_blocks", 1]
    run = train(script, prepared, tmp_path / "out", "--init_lora", path, *words, code=2)
    *_, first, layers_fault, rank_fault, kind_fault = run.err.splitlines()
    assert first == "error: 3 things are wrong with --init_lora:"
    assert rank_fault.endswith("and this command 2: type --rank 4 and leave out --rank_pattern")
    assert kind_fault == f"  --init_lora {path} is a DoRA: add --use_dora"
    layers = layers_fault.split("--lora_layers ")[1].split()[0]
    mended = ["--lora_layers", layers, "--rank", 4, "--use_dora"]
    train(script, prepared, tmp_path / "mended", "--init_lora", path, *mended)
    path.unlink()
    assert refusal("--use_dora") == f"--init_lora {path}: there is no such file: check the path"
    outside = {
        f"transformer.proj_out.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (1, 32)), ("B", (64, 1)))
    }
    save_file(outside, path)
    assert "has a LoRA on proj_out, which is not trained here: begin with another" in refusal()
