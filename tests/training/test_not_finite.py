"""A NaN or an infinity stops the run, with a diagnosis, before anything is written."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.records import PromptEmbedding
from sd3_lora.stage_one.embedding_store import EmbeddingStore, write_embeddings
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.training import not_finite
from sd3_lora.training.checkpoints import read_state
from sd3_lora.training.state import Training
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import PROMPT, Prepared
from PIL import Image
from safetensors.torch import load_file
from training_runs import Run, Script, patch_loss, train, training_script, use_float16, write_again


class Exploding(torch.autograd.Function):
    """A finite loss with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def assert_no_weights_but(run: Run, *checkpoints: str) -> None:
    assert not (run.folder / LORA_FILE).exists()
    assert sorted(path.name for path in run.folder.glob("*checkpoint*")) == sorted(checkpoints)
    for name in checkpoints:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(run.folder / name / LORA_FILE).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_embedding_stops_the_run(script: Script, private: Prepared, tmp_path: Path, value: float) -> None:
    def spoiled(row: PromptEmbedding) -> PromptEmbedding:
        prompt_embeds = row.prompt_embeds.clone()
        prompt_embeds[50, 7] = value
        return replace(row, prompt_embeds=prompt_embeds)

    store = EmbeddingStore(private.embeddings)
    write_embeddings(private.embeddings, store.provenance, [spoiled(row) for row in store.read_all()])
    run = train(script, private, tmp_path / "out", code=2)
    assert f"{private.embeddings} holds a NaN or infinity for {PROMPT!r}: " in run.error
    assert run.wrote_no_weights()


@pytest.mark.parametrize("part", ["mean", "std"])
def test_a_broken_latent_stops_the_run(script: Script, private: Prepared, tmp_path: Path, part: str) -> None:
    path = private.latents / f"{hash_file(private.pictures / '01.png')}.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(part):
            tensor[3, 2, 1] = math.nan
    write_again(path, tensors)  # else the checksum has a word before the number
    run = train(script, private, tmp_path / "out", "--max_train_steps", 6, code=2)  # one pass and one more
    assert f"{path} holds a NaN or infinity: " in run.error
    assert run.wrote_no_weights()


@pytest.mark.parametrize("part", ["mean", "std"])
def test_a_latent_that_is_no_pictures_stops_the_run(
    script: Script, private: Prepared, tmp_path: Path, part: str
) -> None:
    path = private.latents / f"{hash_file(private.pictures / '01.png')}.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(part):
            tensor[3, 2, 1] = 1e8
    write_again(path, tensors)
    run = train(script, private, tmp_path / "out", "--max_train_steps", 6, code=2)
    assert f"{path} holds 1e+08, where the latents of a picture are about 1: delete it and run " in run.error
    assert run.wrote_no_weights()


def test_a_broken_mask_stops_the_run(script: Script, private: Prepared, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for picture in private.pictures.iterdir():
        with Image.open(picture) as opened:
            Image.new("L", opened.size, 255).save(masks / picture.name)
    shared = [*private.flags[:4], "--output_path", private.latents]
    assert script("precompute_latents", *shared, "--mask_data_dir", masks).code == 0
    path = private.latents / f"{hash_file(private.pictures / '01.png')}.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("mask"):
            tensor[0, 2, 1] = math.nan
    write_again(path, tensors)
    run = train(script, private, tmp_path / "out", "--masked_loss", "--mask_data_dir", masks, code=2)
    assert f"{path} holds a NaN or infinity in its mask: delete it and run " in run.error
    assert run.wrote_no_weights()


def break_at(monkeypatch: pytest.MonkeyPatch, step: int, spoil: Callable[[Training], None]) -> list[int]:
    """Spoils a run before a step; returns a list of the steps that it began."""
    module, steps = training_script(), list[int]()
    accumulate = module.accumulate

    def spoiled(training: Training, *words: Any) -> Any:
        steps.append(training.step)
        if training.step == step:
            spoil(training)
        return accumulate(training, *words)

    monkeypatch.setattr(module, "accumulate", spoiled)
    return steps


def spoil_weights(training: Training, value: float) -> None:
    training.trainables.parameters[0].data[3] = value


def spoil_optimizer(training: Training, value: float) -> None:
    next(iter(training.optimizer.state.values()))["exp_avg"][3] = value


def spoil_average(training: Training, value: float) -> None:
    assert training.average is not None
    training.average.tensors[0][3] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=["NaN", "infinity", "overflow"])
@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (spoil_weights, "the LoRA's weights are not finite at step 4 in fp32 (pictures "),
        (spoil_optimizer, "the optimizer's state is not finite at step 4 in fp32 (pictures "),
        (spoil_average, "the moving average is not finite at step 4 in fp32 (pictures "),
    ],
    ids=["LoRA weight", "optimizer", "EMA"],
)
def test_what_the_run_holds_is_named_before_it_is_written(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Training, float], None],
    culprit: str,
    value: float,
) -> None:
    steps = break_at(monkeypatch, 4, lambda training: spoil(training, value))
    words = ["--max_train_steps", 40, "--checkpointing_steps", 2, "--use_ema"]
    run = train(script, prepared, tmp_path, *words, code=2)
    assert run.error.startswith(culprit)
    assert "type --resume_from_checkpoint latest to go on" in run.error
    assert f"the last good checkpoint is {run.folder / 'checkpoint-2'}, and no weights were written since" in run.error
    assert_no_weights_but(run, "checkpoint-2")
    assert steps[-1] == 4


def overflow(training: Training) -> None:
    training.transformer.proj_out.weight.data.fill_(6e4)


def grow(training: Training) -> None:
    training.trainables.parameters[0].data.mul_(1e15).add_(1e15)


@pytest.mark.parametrize(
    ("spoil", "is_half", "sentence"),
    [
        (
            overflow,
            True,
            "without its LoRA, overflows there in fp16, at any learning rate: type --mixed_precision bf16",
        ),
        (grow, True, "gives finite numbers there, so the LoRA has grown too large: lower --learning_rate 0.0001; "),
        (grow, False, "gives finite numbers there, so the LoRA has grown too large: lower --learning_rate 0.0001; "),
    ],
    ids=["the base in fp16", "the rate in fp16", "the rate in fp32"],
)
def test_an_overflow_of_the_base_is_told_apart_from_a_rate_that_is_too_high(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Training], None],
    is_half: bool,
    sentence: str,
) -> None:
    if is_half:
        use_float16(monkeypatch)
    break_at(monkeypatch, 3, spoil)
    module, computed, asked = training_script(), list[torch.Tensor](), list[torch.Tensor]()
    micro_step, find_cause = module.micro_step, not_finite.find_cause

    def noted(model: Any, inputs: Any, *words: Any) -> torch.Tensor:
        computed.append(inputs.noise)
        loss: torch.Tensor = micro_step(model, inputs, *words)
        return loss

    def asked_for(model: Any, inputs: Any, *words: Any) -> Any:
        asked.append(inputs.noise)
        return find_cause(model, inputs, *words)

    monkeypatch.setattr(module, "micro_step", noted)
    monkeypatch.setattr(not_finite, "find_cause", asked_for)
    run = train(script, prepared, tmp_path, "--max_train_steps", 6, "--checkpointing_steps", 2, code=2)
    assert len(asked) == 1
    assert torch.equal(asked[0], computed[2])  # the cause is looked for in the step that failed
    assert re.match(r"the loss is (nan|inf) at step 3 in fp", run.error)
    assert "; the base alone, " in run.error
    assert sentence in run.error
    assert_no_weights_but(run, "checkpoint-2")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_stops_the_run_before_a_write(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    patch_loss(monkeypatch, lambda step, loss: loss * (value if step == 4 else 1))
    words = ["--max_train_steps", 6, "--checkpointing_steps", 2]
    run = train(script, prepared, tmp_path, *words, code=2)
    assert f"the loss is {value} at step 4 in fp32" in run.error
    assert re.search(r"\(pictures 0\d\.png\)", run.error)
    assert f"the last good checkpoint is {run.folder / 'checkpoint-2'}, and no weights were written since" in run.error
    assert_no_weights_but(run, "checkpoint-2")
    assert [line["step"] for line in run.losses] == [1, 2]


def test_a_broken_loss_in_the_last_step_stops_the_run(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_loss(monkeypatch, lambda step, loss: loss * (math.nan if step == 3 else 1))
    run = train(script, prepared, tmp_path, code=2)
    assert "the loss is nan at step 3" in run.error
    assert run.error.rstrip().endswith("; no weights were written")
    assert_no_weights_but(run)


def test_detection_lags_by_ten_steps_at_most(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def change(step: int, loss: torch.Tensor) -> torch.Tensor:
        steps.append(step)
        return loss * (math.nan if step == 2 else 1)

    patch_loss(monkeypatch, change)
    run = train(script, prepared, tmp_path, "--max_train_steps", 40, code=2)
    assert "the loss is nan at step 2" in run.error
    assert steps[-1] <= 12


def test_an_infinite_gradient_without_a_scaler_stops_the_run(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_loss(monkeypatch, lambda step, loss: Exploding.apply(loss) if step == 3 else loss)
    run = train(script, prepared, tmp_path, "--checkpointing_steps", 2, code=2)
    assert re.search("gradient norm is (inf|nan) at step 3 in fp32", run.error)
    assert_no_weights_but(run, "checkpoint-2")


def test_an_infinite_gradient_under_the_scaler_skips_its_step(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_float16(monkeypatch)
    patch_loss(monkeypatch, lambda step, loss: Exploding.apply(loss) if step in (4, 5) else loss)
    run = train(script, prepared, tmp_path, "--max_train_steps", 7, "--checkpointing_steps", 1)
    lines = run.losses
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert {4, 5} <= {line["step"] for line in lines if line["skipped"]} < set(range(1, 8))
    assert re.search(rf"\b{sum(line['skipped'] for line in lines)} (steps )?skipped by the scaler", run.out)
    for line in lines[1:]:
        before, after = (load_file(run.folder / f"checkpoint-{line['step'] - i}" / LORA_FILE) for i in (1, 0))
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        assert unchanged == line["skipped"]
        assert (line["gradient_norm"] is None) == line["skipped"]
    scales = [read_state(run.folder / f"checkpoint-{step}")["scaler"]["scale"] for step in range(1, 8)]
    assert scales[3:5] == [scales[2] / 2, scales[2] / 4]


def test_the_schedule_waits_for_a_skipped_step(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate's scheduler does; torch would warn of a schedule that is ahead of its optimizer."""
    use_float16(monkeypatch)
    patch_loss(monkeypatch, lambda step, loss: Exploding.apply(loss) if step <= 2 else loss)
    words = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 100, "--max_train_steps", 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = train(script, prepared, tmp_path, *words).losses
    taken = 0
    for line in lines:
        assert line["learning_rate"] == pytest.approx(1e-6 * taken)
        taken += not line["skipped"]
    assert [line["skipped"] for line in lines[:2]] == [True, True]
    assert taken > 0


def test_twenty_skipped_steps_in_a_row_stop_the_run(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_float16(monkeypatch)
    patch_loss(monkeypatch, lambda _, loss: Exploding.apply(loss))
    run = train(script, prepared, tmp_path, "--max_train_steps", 40, code=2)
    assert "20 steps in a row had infinite gradients in fp16 up to step 20: type --mixed_precision bf16" in run.error
    assert_no_weights_but(run)
    assert [line["skipped"] for line in run.losses] == [True] * 20
