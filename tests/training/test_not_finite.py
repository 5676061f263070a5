"""A NaN or an infinity stops the run, with a diagnosis, before anything is written."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.records import PromptEmbedding
from sd3_lora.stage_one.embedding_store import EmbeddingStore, write_embeddings
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.training.checkpoints import read_state
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import PROMPT, Prepared
from safetensors.torch import load_file
from training_runs import Run, Script, patch_loss, train, use_float16, write_again


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
