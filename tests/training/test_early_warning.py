"""The early warning: the same losses each time, on crops that are held back, and sentences when they part."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training import early_warning, watch
from sd3_lora.training.early_warning import EarlyWarning, Measurement
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import PROMPT, TRAINING_SCRIPT, Prepared
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from training_runs import Run, Script, same_lora, train

LEARNS = ["--learning_rate", 0.01, "--lora_dropout", 0.3]
WARNS = ["--early_warning_steps", 1]


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "early_warning.jsonl").read_text().splitlines()]


def test_the_run_is_as_if_nothing_had_been_measured(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "with", *LEARNS, *WARNS)
    without = train(script, prepared, tmp_path / "without", *LEARNS)
    assert run.losses == without.losses
    assert same_lora(run.folder / LORA_FILE, without.folder / LORA_FILE)
    assert [line["step"] for line in lines(run)] == [0, 1, 2, 3]
    assert [line["training_loss"] is None for line in lines(run)] == [True, False, False, False]
    losses = [line["loss"] for line in run.losses]
    assert lines(run)[-1]["training_loss"] == pytest.approx(sum(losses) / 3)
    assert lines(run)[0]["class_loss"] == 0  # before the first step the LoRA does nothing
    assert all(line["class_loss"] > 0 for line in lines(run)[1:])
    assert (
        "early warning: loss at 4 noise levels of 4 pictures, on crops that are trained on, since none is held back; "
        "and drift of the class prompt 'a photo of a robot'\n" in run.out
    )


def test_its_values(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Before the first step: the base's loss, written out, on the one crop that --center_crop holds back."""
    run = train(script, prepared, tmp_path, *WARNS, "--center_crop", "--max_train_steps", 1, "--num_crops", 1)
    assert "4 pictures, on crops that are not trained on; and" in run.out
    assert "note: " not in run.out
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer")
    config = json.loads((prepared.model / "vae" / "config.json").read_text())
    with EmbeddingStore(prepared.embeddings) as store:
        row = store.read(PROMPT)
    sigmas = torch.linspace(1, 0.001, 1000)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    noise = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for path in prepared.latents.glob("*.safetensors"):
        held_back = sorted(name for name in load_file(path) if name.endswith(".mean"))
        if len(held_back) == 1:  # a square picture
            continue
        latents = (load_file(path)[first_of(held_back)].float() - config["shift_factor"]) * config["scaling_factor"]
        for level in (125, 375, 625, 875):
            noisy = (1 - sigmas[level]) * latents + sigmas[level] * noise
            velocity = transformer(
                hidden_states=noisy[None],
                timestep=1000 * sigmas[level : level + 1],
                encoder_hidden_states=row.prompt_embeds[None].float(),
                pooled_projections=row.pooled_prompt_embeds[None].float(),
            ).sample
            losses.append((velocity - (noise - latents)).square().mean().item())
    assert len(losses) == 4 * 4
    assert lines(run)[0]["subject_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def first_of(names: list[str]) -> str:
    """The first crop that is not the central one, which is the middle of three."""
    central = sorted(names, key=place_of)[1]
    return next(name for name in names if name != central)


def place_of(name: str) -> tuple[int, ...]:
    return tuple(map(int, "".join(c if c.isdigit() else " " for c in name).split()))


def test_a_resumed_run_goes_on(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = [*LEARNS, *WARNS, "--checkpointing_steps", 2]
    whole = train(script, prepared, tmp_path / "whole", *words, "--max_train_steps", 4)
    folder = tmp_path / "resumed"
    train(script, prepared, folder, *words)
    shutil.rmtree(folder / "checkpoint-3")
    run = train(script, prepared, folder, *words, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert lines(run) == lines(whole)


def test_the_class_is_compared_with_the_base_alone(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Not with the LoRA that the run begins with."""
    first = train(script, prepared, tmp_path / "first", *LEARNS)
    run = train(script, prepared, tmp_path / "run", *WARNS, "--init_lora", first.folder, "--max_train_steps", 1)
    assert lines(run)[0]["class_loss"] > 0


@pytest.mark.parametrize("why", ["pissa", "no prompt"])
def test_without_drift(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A LoRA that starts from the weights has another base than the model."""
    words = ["--init_lora_weights", why] if why == "pissa" else []
    if not words:
        monkeypatch.setattr(EmbeddingStore, "prompts_with_role", lambda _, role: (PROMPT,) if role != "class" else ())
    run = train(script, prepared, tmp_path, *WARNS, *words, "--max_train_steps", 1)
    assert [line["class_loss"] for line in lines(run)] == [None, None]
    notes = {
        "pissa": "note: --init_lora_weights pissa changes the base itself: no drift is measured",
        "no prompt": "note: stage one has embedded no class prompt (compute_embeddings.py --class_prompt): no drift is "
        "measured",
    }
    assert notes[why] in run.out.splitlines()
    assert "since none is held back\n" in run.out


@pytest.mark.parametrize("fault", ["not finite", "disk"])
def test_a_failure_costs_a_sentence(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "disk":
        (tmp_path / "early_warning.jsonl").mkdir()
        monkeypatch.setattr(early_warning, "keep_lines", lambda *_: [])
    else:
        monkeypatch.setattr(EarlyWarning, "_mean", lambda *_: math.nan)
    run = train(script, prepared, tmp_path, *WARNS)
    notes = [line for line in run.out.splitlines() if line.startswith("note: the early warning of step ")]
    assert len(notes) == 4
    assert notes[0].endswith("): training goes on")
    assert len(run.losses) == 3


def history(subject: list[float], of_class: list[float], training: list[float]) -> list[Measurement]:
    columns = zip(training, subject, of_class, strict=True)
    return [Measurement(50 * number, *values) for number, values in enumerate(columns)]


def make_warning(prepared: Prepared, tmp_path: Path, *more: str) -> EarlyWarning:
    """Without measurements yet; whose pictures have crops that are held back."""
    module = importlib.import_module(TRAINING_SCRIPT)
    made: list[EarlyWarning] = []

    def make(*words: Any) -> None:
        made.append(EarlyWarning(*words))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "EarlyWarning", make)
        words = [*prepared.flags, *WARNS, "--device", "cpu", "--center_crop", "--num_crops", 1, *more]
        with pytest.raises(AttributeError):  # `make` returns none
            module.main([str(word) for word in [*words, "--max_train_steps", 1, "--output_dir", tmp_path]])
    return made[0]


@pytest.fixture
def warning(prepared: Prepared, tmp_path: Path) -> EarlyWarning:
    return make_warning(prepared, tmp_path)


FALLS, RISES = [0.50, 0.40, 0.30, 0.25, 0.20, 0.15], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
LITTLE = [0.0, 0.001, 0.002, 0.003, 0.004, 0.005]


@pytest.mark.parametrize(
    ("subject", "of_class", "training", "says"),
    [
        (FALLS, LITTLE, FALLS, []),
        (
            [0.50, 0.45, 0.40, 0.41, 0.43, 0.44],
            LITTLE,
            FALLS,
            [
                "early warning: since step 100 the loss on held-back crops has risen from 0.4000 to 0.4100, while the "
                "training loss falls: the pictures are being memorized, and the LoRA of step 100 may be the better one"
            ],
        ),
        ([0.50, 0.45, 0.40, 0.405, 0.406, 0.407], LITTLE, FALLS, []),  # not by so much
        ([0.50, 0.45, 0.40, 0.41, 0.43, 0.44], LITTLE, FALLS[::-1], []),  # the training loss rises too
        (
            FALLS,
            RISES,
            FALLS,
            [
                "early warning: since step 0 the subject's loss has fallen by 0.2500, and that of the class prompt "
                "'a photo of a robot' has risen by 0.3000: more is forgotten than learned; pick an earlier LoRA, lower "
                "--learning_rate, or add --with_prior_preservation"
            ],
        ),
    ],
)
def test_a_sentence_when_one_falls_and_the_other_rises(
    warning: EarlyWarning, subject: list[float], of_class: list[float], training: list[float], says: list[str]
) -> None:
    """Each once."""
    assert warning.has_held_back
    said = []
    for measurement in history(subject, of_class, training):
        said += warning.take(measurement)
    assert said == says


@pytest.mark.parametrize("term", ["prediction", "preference"])
def test_its_advice_goes_with_the_flags(prepared: Prepared, tmp_path: Path, term: str) -> None:
    """--with_prior_preservation is refused beside --prior_term."""
    warning = make_warning(prepared, tmp_path, "--prior_term", term)
    said = [sentence for each in history(FALLS, RISES, FALLS) for sentence in warning.take(each)]
    assert [sentence.rpartition(", or ")[2] for sentence in said] == ["raise --prior_term_weight"]


def test_a_resumed_run_says_nothing_twice(warning: EarlyWarning, prepared: Prepared, tmp_path: Path) -> None:
    measured = history([*FALLS, 0.12, 0.1], [*RISES, 0.6, 0.7], [*FALLS, 0.12, 0.1])
    assert [sentence for each in measured[:6] for sentence in warning.take(each)]
    (tmp_path / "early_warning.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in measured[:6]))
    resumed = make_warning(prepared, tmp_path)
    resumed.go_on_from(measured[5].step)
    assert resumed.history == measured[:6]
    assert not [sentence for each in measured[6:] for sentence in resumed.take(each)]
