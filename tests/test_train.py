"""Training from top to bottom on the tiny model: its numbers, what it refuses, and what it never does.

Shapes: B batch, S text tokens, D joint attention width, P pooled width.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from sd3_lora.checkpoints import read_state
from sd3_lora.devices import ChosenDtype
from sd3_lora.embedding_store import EmbeddingStore, write_embeddings
from sd3_lora.images import hash_file
from sd3_lora.lora import LORA_FILE
from sd3_lora.records import PromptEmbedding

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT, PROMPT, TRAINING_SCRIPT, Prepared, Result, save_pictures, save_tiny_sd3
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

Script = Callable[..., Result]


@dataclass(frozen=True)
class Run:
    """A training run: its folder, and what it printed."""

    folder: Path
    out: str
    err: str

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The lines of losses.jsonl."""
        return [json.loads(line) for line in (self.folder / "losses.jsonl").read_text().splitlines()]

    @property
    def lora(self) -> dict[str, torch.Tensor]:
        """The LoRA file's tensors."""
        return load_file(self.folder / LORA_FILE)

    @property
    def error(self) -> str:
        """The one sentence of a run that was refused, which has written nothing that looks like a result."""
        sentences = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, self.err
        assert self.err.splitlines()[-1] == sentences[0]
        assert "Traceback" not in self.err
        return sentences[0].removeprefix("error: ")

    def wrote_no_weights(self) -> bool:
        """Whether there is neither a LoRA nor a checkpoint, finished or not."""
        return not list(self.folder.glob("**/*.safetensors*")) and not list(self.folder.glob("*checkpoint*"))


@dataclass(frozen=True)
class Flags:
    """Other flags than those of a finished stage one."""

    flags: list[object]


def same_lora(left: Path, right: Path) -> bool:
    """Whether two LoRA files hold the same bits; safetensors writes its metadata in any order."""
    tensors, others = load_file(left), load_file(right)
    assert tensors.keys() == others.keys()
    with safe_open(left, "pt") as mine, safe_open(right, "pt") as theirs:
        assert mine.metadata() == theirs.metadata()
    return all(torch.equal(tensors[name], others[name]) for name in tensors)


def train(script: Script, stage_one: Prepared | Flags, folder: Path, *words: object, code: int = 0) -> Run:
    """Runs training on a CPU with some flags, 3 steps unless told; checks its exit code."""
    shared = ["--device", "cpu", "--max_train_steps", 3, "--output_dir", folder]
    result = script(TRAINING_SCRIPT, *stage_one.flags, *shared, *words)
    assert result.code == code, result.out + result.err
    return Run(folder, result.out, result.err)


def training_script() -> ModuleType:
    return importlib.import_module(TRAINING_SCRIPT)


@pytest.fixture
def private(prepared: Prepared, tmp_path: Path) -> Prepared:
    return private_copy(prepared, tmp_path / "stage_one")


def private_copy(prepared: Prepared, folder: Path) -> Prepared:
    """A copy of the finished stage one that a test may break."""
    shutil.copytree(prepared.pictures, folder / "pictures")
    shutil.copytree(prepared.latents, folder / "latents")
    shutil.copy(prepared.embeddings, folder / "embeddings.parquet")
    return Prepared(prepared.model, folder / "pictures", folder / "embeddings.parquet", folder / "latents")


def patch_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Every loss becomes `change(number of the micro-step from 1, loss)`."""
    original, count = training_script().flow_matching_loss, 0

    def patched(*words: Any, **more: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return change(count, original(*words, **more))

    monkeypatch.setattr(training_script(), "flow_matching_loss", patched)


def use_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 with its scaler, which the script never chooses on a CPU."""
    chosen = ChosenDtype(torch.float16, "fp16: for a test")
    monkeypatch.setattr(training_script(), "choose_training_dtype", lambda *_: chosen)


class Exploding(torch.autograd.Function):
    """A finite loss with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


# Numbers

GOLDEN_LOSSES = [4.174845, 4.255792, 4.249681, 4.171060, 4.053266]


def test_golden_losses(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Pinned; a change that should not alter the numbers must not alter these.

    On BMPs, whose bytes are those of no compressor: the order of the pictures is that of their hashes.
    """
    for path in prepared.pictures.iterdir():
        (tmp_path / "bmp").mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / "bmp" / f"{path.stem}.bmp")
    stage_one = replace(prepared, pictures=tmp_path / "bmp", latents=tmp_path / "latents")
    words = ["--pretrained_model_name_or_path", prepared.model, "--instance_data_dir", stage_one.pictures]
    assert script("precompute_latents", *words, "--output_path", stage_one.latents, "--device", "cpu").code == 0
    flags = ["--learning_rate", 0.02, "--train_batch_size", 2, "--lora_alpha", 8, "--lr_scheduler", "cosine"]
    run = train(script, stage_one, tmp_path / "run", *flags, "--max_train_steps", 5)
    losses = [line["loss"] for line in run.losses]
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=1e-4)
    assert [line["step"] for line in run.losses] == [1, 2, 3, 4, 5]
    # The pins see the optimizer: without it the last are others.
    still = train(script, stage_one, tmp_path / "still", *flags, "--max_train_steps", 5, "--learning_rate", 1e-12)
    assert still.losses[0]["loss"] == pytest.approx(losses[0], abs=1e-6)
    assert abs(still.losses[4]["loss"] - losses[4]) > 3e-3


def test_the_first_step_recomputed(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """The loss and the gradient norm of a window of two micro-batches of two, from the files, without our code."""
    flags = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--lora_alpha", 8, "--learning_rate", 1e-12]
    run = train(script, prepared, tmp_path, *flags, "--max_train_steps", 1)
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer").requires_grad_(False)
    vae_config = json.loads((prepared.model / "vae" / "config.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(prepared.model / "scheduler")
    (row,) = (row for row in pq.read_table(prepared.embeddings).to_pylist() if row["prompt"] == PROMPT)
    prompt_embeds = torch.tensor(np.array(row["prompt_embeds"])).float().reshape(1, 77 + 20, 48)  # (1, S, D)
    pooled = torch.tensor(np.array(row["pooled_prompt_embeds"])).float()[None]  # (1, P)

    gradients_of = []
    for name in {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in run.lora}:
        lora_a = run.lora[f"transformer.{name}.lora_A.weight"]  # the rate is too small to have moved it
        lora_b = torch.zeros_like(run.lora[f"transformer.{name}.lora_B.weight"], requires_grad=True)
        gradients_of.append(lora_b)

        def add(_module: Any, inputs: Any, output: torch.Tensor, a: Any = lora_a, b: Any = lora_b) -> torch.Tensor:
            return output + 8 / 4 * inputs[0] @ a.T @ b.T

        transformer.get_submodule(name).register_forward_hook(add)

    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    generator = torch.Generator().manual_seed(0)
    image_ids = sorted(hash_file(path) for path in prepared.pictures.iterdir())
    losses = []
    for chosen in (order[:2], order[2:4]):
        which_crop = torch.rand(2, generator=generator)
        posterior_noise, noise = (torch.randn(2, 16, 8, 8, generator=generator) for _ in range(2))
        density = compute_density_for_timestep_sampling("logit_normal", 2, 0.0, 1.0, generator=generator)
        raw = []
        for index, draw, sample in zip(chosen, which_crop, posterior_noise, strict=True):
            tensors = load_file(prepared.latents / f"{image_ids[index]}.safetensors")
            crops = sorted({name.rsplit(".", 1)[0] for name in tensors})
            crop = crops[int(draw * len(crops))]
            raw.append(tensors[f"{crop}.mean"] + tensors[f"{crop}.std"] * sample)
        latents = (torch.stack(raw) - vae_config["shift_factor"]) * vae_config["scaling_factor"]
        indices = (density * 1000).long()
        sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
        velocity = transformer(
            hidden_states=(1 - sigmas) * latents + sigmas * noise,
            timestep=scheduler.timesteps[indices],
            encoder_hidden_states=prompt_embeds.expand(2, -1, -1),
            pooled_projections=pooled.expand(2, -1),
        ).sample
        losses.append(((velocity - (noise - latents)) ** 2).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.stack([b.grad.norm() for b in gradients_of]).norm()  # lora_A has none: lora_B is zero

    (line,) = run.losses
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert line["learning_rate"] == 1e-12
    assert line["skipped"] is False


def test_whole_windows_only(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pictures and accumulation 4: every update sees four, each with a quarter of the weight."""
    module = training_script()
    seen: list[str] = []
    original_batch = module.TrainingData.batch

    def batch(data: Any, indices: Any, draws: Any) -> Any:
        result = original_batch(data, indices, draws)
        seen.extend(result.image_ids)
        return result

    before: list[int] = []
    original_step = module.optimizer_step

    def optimizer_step(*words: Any) -> Any:
        before.append(len(seen))
        return original_step(*words)

    monkeypatch.setattr(module.TrainingData, "batch", batch)
    monkeypatch.setattr(module, "optimizer_step", optimizer_step)
    train(script, prepared, tmp_path, "--gradient_accumulation_steps", 4, "--max_train_steps", 5)
    assert before == [4, 8, 12, 16, 20]
    assert set(Counter(seen).values()) == {4}
    assert len(set(seen)) == 5


def test_gradients_are_clipped_to_the_norm() -> None:
    module = training_script()
    parameter = torch.nn.Parameter(torch.zeros(2))
    training = module.Training.__new__(module.Training)
    training.parameters = [parameter]
    training.optimizer = torch.optim.SGD([parameter], lr=1.0)
    training.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for max_norm, moved in ((0.5, [-0.3, -0.4]), (10.0, [-3.0, -4.0])):
        parameter.data.zero_()
        parameter.grad = torch.tensor([3.0, 4.0])
        norm, skipped = module.optimizer_step(training, max_norm)
        assert norm.item() == pytest.approx(5.0)  # before clipping
        assert skipped is False
        assert parameter.tolist() == pytest.approx(moved, rel=1e-4)
        assert parameter.grad is None


def test_the_scaler_skips_an_infinite_gradient() -> None:
    module = training_script()
    parameter = torch.nn.Parameter(torch.zeros(2))
    training = module.Training.__new__(module.Training)
    training.parameters = [parameter]
    training.optimizer = torch.optim.SGD([parameter], lr=1.0)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    training.scaler.scale(parameter.sum() * math.inf).backward()
    norm, skipped = module.optimizer_step(training, 1.0)
    assert not math.isfinite(norm)
    assert skipped is True
    assert parameter.tolist() == [0, 0]
    assert training.scaler.get_scale() == 512.0
    training.scaler.scale(parameter.sum() * 0.5).backward()
    norm, skipped = module.optimizer_step(training, 1.0)
    assert norm.item() == pytest.approx(0.5**0.5)  # unscaled before it is measured
    assert skipped is False
    assert parameter.tolist() == pytest.approx([-0.5, -0.5])


# What is trained


@dataclass
class Attached:
    """What `attach_lora` was given and made, with copies from before the first step."""

    base: list[tuple[torch.Tensor, torch.Tensor]]
    transformer: SD3Transformer2DModel
    lora: dict[str, tuple[torch.nn.Parameter, torch.Tensor]]


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[Attached]:
    """One entry for each run of the test."""
    module = training_script()
    found: list[Attached] = []
    original = module.attach_lora

    def attach_lora(transformer: SD3Transformer2DModel, *words: Any) -> Any:
        base = [(tensor, tensor.detach().clone()) for tensor in transformer.state_dict(keep_vars=True).values()]
        parameters = original(transformer, *words)
        lora = {
            name: (parameter, parameter.detach().clone())
            for name, parameter in transformer.named_parameters()
            if parameter.requires_grad
        }
        assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter, _ in lora.values()}
        found.append(Attached(base, transformer, lora))
        return parameters

    monkeypatch.setattr(module, "attach_lora", attach_lora)
    return found


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_lora_is_float32_and_the_base_never_changes(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attached: list[Attached],
    precision: str,
    dtype: torch.dtype,
) -> None:
    if precision == "fp16":
        use_float16(monkeypatch)
    run = train(script, prepared, tmp_path, "--mixed_precision", precision)
    assert f"transformer in {precision.replace('no', 'fp32')}" in run.out
    (seen,) = attached
    assert all(tensor.dtype == dtype for tensor, _ in seen.base if tensor.is_floating_point())
    assert all(torch.equal(tensor, copy) for tensor, copy in seen.base)
    assert not any(tensor.requires_grad for tensor, _ in seen.base)
    assert len(seen.lora) == 30
    for name, (parameter, start) in seen.lora.items():
        assert parameter.dtype == torch.float32, name
        # The last block drops its text stream, so what that asks for has no gradient.
        idle = "transformer_blocks.1.attn.add_q_proj" in name
        assert torch.equal(parameter, start) == idle, name
    assert all(tensor.dtype == torch.float32 for tensor in run.lora.values())
    state = read_state(run.folder / "checkpoint-3")["optimizer"]["state"]
    assert {tensor.dtype for moments in state.values() for tensor in moments.values()} == {torch.float32}
    losses = [line["loss"] for line in run.losses]
    plain = train(script, prepared, tmp_path / "fp32") if precision == "bf16" else None
    if plain is not None:  # the precision is real, and near
        assert losses != [line["loss"] for line in plain.losses]
        assert losses == pytest.approx([line["loss"] for line in plain.losses], rel=0.02)


@pytest.mark.parametrize(("launched", "says"), [("bf16", "bf16: as asked"), ("no", "fp32: "), ("fp16", "runs in fp32")])
def test_the_precision_of_accelerate_launch(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attached: list[Attached],
    launched: str,
    says: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    run = train(script, prepared, tmp_path, "--max_train_steps", 1)
    assert says in run.out.splitlines()[0]
    assert {parameter.dtype for parameter, _ in attached[0].lora.values()} == {torch.float32}
    asked = train(script, prepared, tmp_path / "asked", "--max_train_steps", 1, "--mixed_precision", "no")
    assert "transformer in fp32" in asked.out  # the flag wins


def test_neither_vae_nor_text_encoder_is_loaded(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("training loads the transformer alone")

    for kind in (AutoencoderKL, CLIPTextModelWithProjection, T5EncoderModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    train(script, prepared, tmp_path)


# Numbers that are not finite


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
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(part):
            tensor[3, 2, 1] = math.nan
    save_file(tensors, path, metadata)
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
    assert_no_weights_but(run, "checkpoint-2")
    assert [line["step"] for line in run.losses] == [1, 2]


def test_a_broken_loss_in_the_last_step_stops_the_run(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_loss(monkeypatch, lambda step, loss: loss * (math.nan if step == 3 else 1))
    run = train(script, prepared, tmp_path, code=2)
    assert "the loss is nan at step 3" in run.error
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


# What stage one left


def follow(script: Script, run: Run) -> str:
    """Types the command that the error names; returns its script."""
    _, name, *words = shlex.split(run.error.split("`")[1])
    result = script(name.removesuffix(".py"), *words)
    assert result.code == 0, result.err
    return name


def change_a_picture(stage_one: Prepared) -> None:
    save_pictures(stage_one.pictures / "new", [(64, 64)], seed=9)
    (stage_one.pictures / "new" / "00.png").replace(stage_one.pictures / "03.png")
    (stage_one.pictures / "new").rmdir()


def forget_a_picture(stage_one: Prepared) -> None:
    (stage_one.latents / f"{hash_file(stage_one.pictures / '03.png')}.safetensors").unlink()


STALE: dict[str, tuple[Callable[[Prepared], Any], list[object], str, list[str]]] = {
    # what the user does, the flags, what the sentence says, the scripts that mend it
    "no embeddings": (lambda s: s.embeddings.unlink(), [], "embeddings.parquet is not there", ["compute_embeddings"]),
    "other prompt": (
        lambda s: None,
        ["--instance_prompt", "a photo of zwx robot"],
        "embeddings.parquet lacks 'a photo of zwx robot'",
        ["compute_embeddings"],
    ),
    "other length": (
        lambda s: None,
        ["--max_sequence_length", 12],
        "was made with max_sequence_length 20, not 12",
        ["compute_embeddings"],
    ),
    "changed picture": (
        change_a_picture,
        [],
        "no latents of 03.png (a new or changed picture)",
        ["precompute_latents"],
    ),
    "missing latents": (forget_a_picture, [], "no latents of 03.png", ["precompute_latents"]),
    "other resolution": (
        lambda s: None,
        ["--resolution", 32],
        "was made with resolution 64, not 32",
        ["precompute_latents"],
    ),
    "more crops": (lambda s: None, ["--num_crops", 5], "lacks the crop 64x64+", ["precompute_latents"]),
    "mirrored twins": (lambda s: None, ["--random_flip"], "-flip of 00.png", ["precompute_latents"]),
}


@pytest.mark.parametrize("name", STALE)
def test_the_named_command_mends_it(script: Script, private: Prepared, tmp_path: Path, name: str) -> None:
    change, words, says, scripts = STALE[name]
    change(private)
    mended = []
    run = train(script, private, tmp_path / "out", *words, code=2)
    assert says in run.error
    for _ in scripts:
        assert run.wrote_no_weights()
        mended.append(follow(script, run).removesuffix(".py"))
        run = train(script, private, tmp_path / "out", *words, code=0 if mended == scripts else 2)
    assert len(run.losses) == 3


def test_another_models_files(script: Script, private: Prepared, tmp_path: Path) -> None:
    """SD3 training on a miniature's files: the exact commands, with both models' names."""
    other = save_tiny_sd3(tmp_path / "other", seed=1, width=48)
    stage_one = replace(private, model=other)
    run = train(script, stage_one, tmp_path / "out", code=2)
    assert run.error == (
        f"{private.embeddings} was made with model {private.model}, not {other}: type `python compute_embeddings.py "
        f"--pretrained_model_name_or_path {other} --instance_data_dir {private.pictures} --device cpu "
        f"--instance_prompt '{PROMPT}' --output_path {private.embeddings} --overwrite`"
    )
    assert run.wrote_no_weights()
    assert follow(script, run) == "compute_embeddings.py"
    run = train(script, stage_one, tmp_path / "out", code=2)
    assert f"was made with model {private.model}, not {other}: type `python precompute_latents.py " in run.error
    assert follow(script, run) == "precompute_latents.py"
    train(script, stage_one, tmp_path / "out")


def spoil(path: Path, kind: str) -> Path:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif path.suffix == ".parquet":
        pq.write_table(pq.read_table(path, columns=["prompt"]).replace_schema_metadata(None), path)
    else:
        save_file({"weight": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "foreign"])
@pytest.mark.parametrize("artefact", ["embeddings", "latents"])
def test_broken_files(script: Script, private: Prepared, tmp_path: Path, artefact: str, kind: str) -> None:
    latents = private.latents / f"{hash_file(private.pictures / '00.png')}.safetensors"
    path = spoil(latents if artefact == "latents" else private.embeddings, kind)
    run = train(script, private, tmp_path / "out", code=2)
    assert f"{path} is not a whole " in run.error
    assert "delete it and run " in run.error
    assert run.wrote_no_weights()


def test_no_pictures(script: Script, private: Prepared, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = train(script, private, tmp_path / "out", "--instance_data_dir", tmp_path / "empty", code=2)
    assert "empty holds no pictures: put .jpg or .png files into it" in run.error
    run = train(script, private, tmp_path / "out", "--instance_data_dir", tmp_path / "nowhere", code=2)
    assert "there is no folder" in run.error


def test_a_folder_that_cannot_be_written(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        run = train(script, prepared, folder, code=2)
        assert f"cannot write to {folder} (" in run.error
        assert run.error.endswith("give another folder")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(("size", "fits"), [(60, 48), (8, 16), (10_000, 256)])
def test_a_resolution_that_the_model_cannot_take(
    script: Script, prepared: Prepared, tmp_path: Path, size: int, fits: int
) -> None:
    run = train(script, prepared, tmp_path / "out", "--resolution", size, code=2)
    assert run.error == (
        f"--resolution {size} does not fit this model, which takes multiples of 16 up to 256: type --resolution {fits}"
    )
    assert not run.folder.exists()


def test_an_unknown_flag(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    for words in (["--max_train_step", 3], ["--ranks", 3], ["stray"]):
        run = train(script, prepared, tmp_path / "out", *words, code=2)
        assert f"unknown argument {words[0]}: `python {TRAINING_SCRIPT}.py --help` lists the flags" in run.error
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_there_are_made_in_a_process_of_its_own(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the process is faked; tests/test_processes.py starts it."""
    shutil.rmtree(private.latents)
    commands: list[list[str]] = []

    def run_here(words: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append([str(word) for word in words])
        code = importlib.import_module("precompute_latents").main(commands[-1][2:])
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr(subprocess, "run", run_here)
    first = train(script, private, tmp_path / "first", "--center_crop")
    sentence = (
        f"{private.latents} holds no latents yet; in a process of its own: python precompute_latents.py "
        f"--pretrained_model_name_or_path {private.model} --instance_data_dir {private.pictures} --device cpu "
        f"--resolution 64 --center_crop --output_path {private.latents}"
    )
    assert sentence in first.out.splitlines()
    assert len(commands) == 1
    assert commands[0][1] == str(PROJECT / "precompute_latents.py")
    assert len(list(private.latents.glob("*.safetensors"))) == 5
    second = train(script, private, tmp_path / "second", "--center_crop")
    assert "in a process of its own" not in second.out
    assert len(commands) == 1
    assert second.losses == first.losses


def test_latents_that_cannot_be_made(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(private.latents)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 2))
    run = train(script, private, tmp_path / "out", code=2)
    assert "there are no latents to train on" in run.error
    assert run.error.split("`")[1].startswith("python precompute_latents.py --pretrained_model_name_or_path ")
    assert run.wrote_no_weights()


def test_the_child_is_not_told_of_the_launcher(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torchrun's variables it would wait for ranks that never come."""
    seen: dict[str, str] = {}

    def capture(words: list[Any], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        return subprocess.CompletedProcess(words, 2)

    shutil.rmtree(private.latents)
    monkeypatch.setattr(subprocess, "run", capture)
    inherited = {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_CPU": "true", "HF_HOME": "/x"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    train(script, private, tmp_path / "out", code=2)
    assert set(inherited) & set(seen) == {"HF_HOME"}
    assert seen["PATH"] == os.environ["PATH"]


def test_without_a_folder_the_pictures_of_the_embeddings_file(
    script: Script, prepared: Prepared, tmp_path: Path
) -> None:
    """The folder may be gone; the ids are in the file."""
    place = prepared.flags.index("--instance_data_dir")
    flags = Flags([*prepared.flags[:place], *prepared.flags[place + 2 :]])
    without = train(script, flags, tmp_path / "a")
    assert "5 pictures at 64 px" in without.out
    assert len(without.losses) == 3
    run = train(script, flags, tmp_path / "b", "--instance_prompt", "another", code=2)
    assert "describes no picture with 'another'" in run.error


# Seeds, and what lies beside the LoRA


def test_seed_zero_is_a_seed_and_none_is_drawn(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    zero = [train(script, prepared, tmp_path / name, "--seed", 0) for name in ("a", "b")]
    assert "5 pictures at 64 px, seed 0\n" in zero[0].out
    assert zero[0].losses == zero[1].losses
    assert same_lora(zero[0].folder / LORA_FILE, zero[1].folder / LORA_FILE)
    one = train(script, prepared, tmp_path / "c", "--seed", 1)
    assert one.losses != zero[0].losses

    assert prepared.flags[-2:] == ["--seed", 0]
    unseeded = Flags(prepared.flags[:-2])
    drawn = [train(script, unseeded, tmp_path / name) for name in ("d", "e")]
    seeds = [json.loads((run.folder / "run.json").read_text())["seed"] for run in drawn]
    assert seeds[0] != seeds[1]
    assert drawn[0].losses != drawn[1].losses
    assert f"seed {seeds[0]}\n" in drawn[0].out
    again = train(script, unseeded, tmp_path / "f", "--seed", seeds[0])
    assert again.losses == drawn[0].losses


def test_what_lies_beside_the_lora(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path, "--rank", 2, "--learning_rate", 0.01)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "checkpoint-3", "losses.jsonl", LORA_FILE, "run.json"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["flags"]["rank"] == 2
    assert record["flags"]["learning_rate"] == 0.01
    assert record["flags"]["timestep_shift"] is None
    assert record["wrote"] == str(tmp_path / LORA_FILE)
    assert record["loss"] == pytest.approx(sum(line["loss"] for line in run.losses) / 3)
    assert [stage["name"] for stage in record["stages"]] == ["load transformer", "train"]
    assert all(stage["peak_host_gib"] > 0.05 for stage in record["stages"])
    card = (tmp_path / "README.md").read_text()
    assert f"Say `{PROMPT}`" in card
    assert "| rank | 2 |" in card
    assert same_lora(tmp_path / "checkpoint-3" / LORA_FILE, tmp_path / LORA_FILE)


def test_the_next_command_draws(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "out")
    _, name, *words = shlex.split(run.out.splitlines()[-1].removeprefix("next: "))
    assert name == "inference.py"
    more = ["--num_steps", 1, "--guidance", 1, "--outdir", tmp_path / "images", "--device", "cpu"]
    assert script("inference", *words, *more).code == 0
    assert len(list((tmp_path / "images").glob("*/img_00.png"))) == 1
