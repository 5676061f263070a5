"""Training from top to bottom on the tiny model: its numbers, its precision, and what lies beside its LoRA.

Shapes: B batch, S text tokens, D joint attention width, P pooled width.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.training.checkpoints import read_state
from sd3_lora.transformer.lora import LORA_FILE

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROMPT, Prepared
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from safetensors.torch import load_file
from training_runs import Flags, Script, same_lora, train, training_script, use_float16
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

# Numbers

GOLDEN_LOSSES = [4.146737, 4.215501, 4.202254, 4.117806, 3.977192]


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

    def batch(*words: Any) -> Any:
        result = original_batch(*words)
        seen.extend(result.image_ids)
        return result

    computed: list[int] = []
    before: list[int] = []
    original_micro_step, original_step = module.micro_step, module.optimizer_step

    def micro_step(*words: Any) -> Any:
        computed.append(1)
        return original_micro_step(*words)

    def optimizer_step(*words: Any) -> Any:
        before.append(len(computed))
        return original_step(*words)

    monkeypatch.setattr(module.TrainingData, "batch", batch)
    monkeypatch.setattr(module, "micro_step", micro_step)
    monkeypatch.setattr(module, "optimizer_step", optimizer_step)
    train(script, prepared, tmp_path, "--gradient_accumulation_steps", 4, "--max_train_steps", 5)
    assert before == [4, 8, 12, 16, 20]
    assert set(Counter(seen).values()) == {4}
    assert len(set(seen)) == 5


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
    assert len(train(script, prepared, tmp_path).losses) == 3


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
    assert names == ["README.md", "checkpoint-3", "losses.jsonl", "pictures.json", LORA_FILE, "report.html", "run.json"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["flags"]["rank"] == 2
    assert record["flags"]["learning_rate"] == 0.01
    assert record["flags"]["timestep_shift"] is None
    assert record["wrote"] == str(tmp_path / LORA_FILE)
    assert record["loss"] == pytest.approx(sum(line["loss"] for line in run.losses) / 3)
    assert [stage["name"] for stage in record["stages"]] == ["load transformer", "train"]
    assert all(stage["peak_host_gib"] > 0.05 for stage in record["stages"])
    card = (tmp_path / "README.md").read_text()
    assert f"put `{PROMPT}` into the prompt" in card
    assert "| LoRA | rank 2" in card
    assert same_lora(tmp_path / "checkpoint-3" / LORA_FILE, tmp_path / LORA_FILE)
    assert (tmp_path / "checkpoint-3" / LORA_FILE).read_bytes() == (tmp_path / LORA_FILE).read_bytes()
    assert record["execution"] == {
        "compiled": False,
        "captured": False,
        "refusal": None,
        "attention_backward": "torch",
    }
    assert record["identity"]["--rank"] == record["flags"]["rank"]
    assert (record["trigger"], record["prompts"], record["steps"]) == (PROMPT, [PROMPT], 3)


def test_the_card_names_a_prompt_that_was_trained_on(script: Script, private: Prepared, tmp_path: Path) -> None:
    """Not a prompt that lost to captions; quotes in it are text."""
    caption = 'a "sks" robot'
    paths = sorted(private.pictures.iterdir())
    for path, text in zip(paths, (caption, f"{caption} at sea", f"{caption} at home", caption, "b"), strict=True):
        path.with_suffix(".txt").write_text(text)
    model = ["--pretrained_model_name_or_path", private.model, "--instance_data_dir", private.pictures]
    embedding = ["--instance_prompt", PROMPT, "--output_path", private.embeddings, "--max_sequence_length", 20]
    said = f"note: 5 of 5 pictures have captions, which are trained on; --instance_prompt {PROMPT!r} is not\n"
    assert said in script("compute_embeddings", *model, *embedding).out
    for flags in (private.flags, [*private.flags[:2], *private.flags[6:]]):  # and without the folder and the prompt
        run = train(script, Flags(flags), tmp_path / "out")
        assert (said in run.out) == (PROMPT in flags)
        card = (run.folder / "README.md").read_text()
        assert f"for example `{caption}`" in card
        assert f"pipeline({json.dumps(caption)}).images" in card
        assert PROMPT not in card.partition("## Training")[0]
        assert json.loads((run.folder / "run.json").read_text())["trigger"] == caption
        assert f"--prompt '{caption}' " in run.out.splitlines()[-1]
        shutil.rmtree(run.folder)


def test_the_miniature_s_next_command_has_the_guidance_at_which_it_draws_best(
    script: Script, prepared: Prepared, on_miniature: Flags, tmp_path: Path
) -> None:
    assert train(script, on_miniature, tmp_path / "miniature").out.splitlines()[-1].endswith(" --guidance 3")
    assert "--guidance" not in train(script, prepared, tmp_path / "other").out


def test_the_next_command_draws(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "out")
    _, name, *words = shlex.split(run.out.splitlines()[-1].removeprefix("next: "))
    assert name == "inference.py"
    more = ["--num_steps", 1, "--guidance", 1, "--outdir", tmp_path / "images", "--device", "cpu"]
    assert script("inference", *words, *more).code == 0
    assert len(list((tmp_path / "images").glob("*/img_00.png"))) == 1
