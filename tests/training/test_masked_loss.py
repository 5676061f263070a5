"""The masked loss: its formula, what a batch weighs, and runs with it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.model_files import MINIATURE
from sd3_lora.common.records import StepInputs
from sd3_lora.plan.memory_plan import TrainingTask
from sd3_lora.plan.step_memory import StepShape, _hollow_inputs, simulate_step
from sd3_lora.training.checkpoints import read_state, write_state
from sd3_lora.training.flow import flow_matching_loss, mask_weights
from sd3_lora.training.flow_flags import FlowConfig, WeightingScheme
from sd3_lora.training.micro_batches import MicroBatches
from sd3_lora.transformer.lora import LORA_FILE

import numpy as np
import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared, save_pictures
from diffusers.training_utils import compute_loss_weighting_for_sd3
from miniature_plans import STEP
from PIL import Image, ImageOps
from safetensors.torch import load_file
from training_runs import Script, private_copy, same_lora, train, training_script

MASKED = ["--masked_loss"]


# The formula


def test_the_weights_against_a_plain_loop() -> None:
    masks = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(0)).half()
    values = masks.double().flatten().tolist()
    for beside in (0.0, 0.1, 1.0):
        total = 0.0
        for value in values:
            total += value + (1 - value) * beside
        expected = [(value + (1 - value) * beside) * len(values) / total for value in values]
        weights = mask_weights(masks, float(masks.double().mean()), beside)
        assert (weights.dtype, weights.shape) == (torch.float32, masks.shape)
        torch.testing.assert_close(weights.double().flatten(), torch.tensor(expected).double(), rtol=1e-6, atol=0)
        assert float(weights.mean()) == pytest.approx(1, rel=1e-6)
    assert torch.equal(mask_weights(masks, 0.3, 1.0), torch.ones(3, 1, 4, 5))
    with pytest.raises(ValueError, match="show nothing of its mask"):
        mask_weights(torch.zeros(1, 4, 4), 0.0, 0.0)


@pytest.mark.parametrize("precondition", [False, True], ids=["velocity", "preconditioned"])
@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt", "cosmap"])
def test_the_loss_against_a_plain_loop(scheme: WeightingScheme, precondition: bool) -> None:
    """Also: two micro-batches of one picture have the mean loss of a batch of two, and half their gradient each."""
    generator = torch.Generator().manual_seed(3)
    velocity, latents, noise = (torch.randn(2, 16, 3, 4, generator=generator) for _ in range(3))
    weights = 2 * torch.rand(2, 1, 3, 4, generator=generator)
    sigmas = torch.tensor([0.3, 0.8]).view(-1, 1, 1, 1)
    config = FlowConfig(weighting_scheme=scheme, precondition_outputs=precondition)
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas).flatten().tolist()
    total = 0.0
    for picture in range(2):
        sigma = float(sigmas[picture])
        for channel in range(16):
            for y in range(3):
                for x in range(4):
                    place = picture, channel, y, x
                    start, end, guess = (float(t[place]) for t in (latents, noise, velocity))
                    error = guess - (end - start)
                    if precondition:
                        error = ((1 - sigma) * start + sigma * end - sigma * guess) - start
                    total += weighting[picture] * float(weights[picture, 0, y, x]) * error**2
    loss = flow_matching_loss(velocity, latents, noise, sigmas, weights, config)
    assert float(loss) == pytest.approx(total / (2 * 16 * 3 * 4), rel=1e-5)
    parts = [
        flow_matching_loss(*(t[i : i + 1] for t in (velocity, latents, noise, sigmas, weights)), config) for i in (0, 1)
    ]
    assert float(sum(parts) / 2) == pytest.approx(float(loss), rel=1e-6)


def test_nothing_is_learned_outside_the_mask() -> None:
    velocity, latents, noise = torch.randn(3, 1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    velocity = velocity[None].requires_grad_()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 1:7] = 1
    sigmas = torch.full((1, 1, 1, 1), 0.5)
    for beside in (0.0, 0.25):
        weights = mask_weights(mask, float(mask.mean()), beside)
        loss = flow_matching_loss(velocity, latents[None], noise[None], sigmas, weights, FlowConfig())
        (gradient,) = torch.autograd.grad(loss, velocity)
        plain = flow_matching_loss(velocity, latents[None], noise[None], sigmas, torch.ones(1), FlowConfig())
        (unmasked,) = torch.autograd.grad(plain, velocity)
        outside = mask.expand_as(gradient) == 0
        assert bool((gradient[outside] == 0).all()) == (beside == 0)
        torch.testing.assert_close(gradient, unmasked * weights)


# What a batch weighs


@pytest.fixture(scope="module")
def masked(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The finished stage one with a mask for each picture: all but its lower half. The masks lie in `masks`."""
    import precompute_latents

    stage_one = private_copy(prepared, tmp_path_factory.mktemp("masked"))
    masks = stage_one.pictures.parent / "masks"
    masks.mkdir()
    for path in stage_one.pictures.glob("*.png"):
        width, height = Image.open(path).size
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 255
        Image.fromarray(mask).save(masks / path.name)
    words = ["--pretrained_model_name_or_path", stage_one.model, "--instance_data_dir", stage_one.pictures]
    words += ["--device", "cpu", "--output_path", stage_one.latents, "--mask_data_dir", masks]
    assert precompute_latents.main([str(word) for word in words]) == 0
    return stage_one


def watch_inputs(monkeypatch: pytest.MonkeyPatch) -> list[StepInputs]:
    """The inputs of every micro-step to come."""
    seen: list[StepInputs] = []
    original = MicroBatches.take

    def watching(batches: MicroBatches) -> Any:
        taken = original(batches)
        seen.append(taken[0].inputs)
        return taken

    monkeypatch.setattr(MicroBatches, "take", watching)
    return seen


def test_a_picture_weighs_one_in_the_mean_over_its_crops(
    script: Script, masked: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_inputs(monkeypatch)
    words = ["--center_crop", "--train_batch_size", 2, "--unmasked_weight", 0.2]
    train(script, masked, tmp_path / "out", *MASKED, *words)
    for inputs in seen:
        assert inputs.loss_weights.shape == (2, 1, 8, 8)
        assert inputs.loss_weights.mean((1, 2, 3)).tolist() == pytest.approx([1, 1], rel=1e-5)
        inside, outside = inputs.loss_weights[..., 0, :].mean(), inputs.loss_weights[..., -1, :].mean()
        assert float(outside / inside) == pytest.approx(0.2, rel=1e-2)


def test_without_masks_nothing_is_carried(
    script: Script, masked: Prepared, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache with masks gives the bits of one without, where they are not asked for."""
    seen = watch_inputs(monkeypatch)
    left, right = (train(script, each, tmp_path / name) for each, name in ((masked, "a"), (prepared, "b")))
    assert {inputs.loss_weights.shape for inputs in seen} == {(1,)}
    assert left.losses == right.losses


def test_class_pictures_weigh_what_they_did(
    script: Script, masked: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no masks: each latent pixel has the weight of the whole."""
    stage_one = private_copy(masked, tmp_path / "stage_one")
    shutil.copytree(masked.pictures.parent / "masks", tmp_path / "stage_one" / "masks")
    save_pictures(tmp_path / "class", [(64, 64)] * 3, seed=9)
    seen = watch_inputs(monkeypatch)
    words = [
        "--with_prior_preservation",
        "--class_prompt",
        "a photo of a robot",
        "--class_data_dir",
        tmp_path / "class",
    ]
    words += ["--num_class_images", 3, "--prior_loss_weight", 0.5, "--center_crop"]
    train(script, stage_one, tmp_path / "out", *MASKED, *words)
    for inputs in seen:
        subject, other = inputs.loss_weights
        assert float(subject.mean()) == pytest.approx(2, rel=1e-5)
        assert len(subject.unique()) > 1
        assert torch.equal(other, torch.ones(1, 8, 8))


def test_a_smaller_batch_weighs_as_much_a_picture(
    script: Script, masked: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In buckets, where what is left of a shape is a smaller batch: over a pass each picture weighs 1, as without."""
    seen = watch_inputs(monkeypatch)
    words = ["--latents_path", tmp_path / "latents", "--mask_data_dir", masked.pictures.parent / "masks"]
    words += ["--use_aspect_ratio_bucket", "--center_crop", "--train_batch_size", 4, "--max_train_steps", 3]
    train(script, masked, tmp_path / "out", *MASKED, *words)
    assert sorted(len(inputs.latents) for inputs in seen) == [1, 2, 2]
    for inputs in seen:
        expected = len(inputs.latents) / 4
        assert inputs.loss_weights.shape == (len(inputs.latents), 1, *inputs.latents.shape[2:])
        assert inputs.loss_weights.mean((1, 2, 3)).tolist() == pytest.approx([expected] * len(inputs.latents), rel=1e-5)


# Runs


def test_the_mask_decides_what_is_learned(script: Script, masked: Prepared, tmp_path: Path) -> None:
    """All of it weighs alike at an unmasked weight of 1; else the numbers are others, by each of both flags."""
    words = [*MASKED, "--train_batch_size", 2]
    plain = train(script, masked, tmp_path / "plain", "--train_batch_size", 2)
    ones = train(script, masked, tmp_path / "ones", *words, "--unmasked_weight", 1)
    zero, tenth = (train(script, masked, tmp_path / str(w), *words, "--unmasked_weight", w) for w in (0, 0.1))
    losses = [[line["loss"] for line in run.losses] for run in (plain, ones, zero, tenth)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len({each[0] for each in (losses[0], *losses[2:])}) == 3
    default = train(script, masked, tmp_path / "default", *words)
    assert default.losses == zero.losses
    (line,) = (line for line in default.out.splitlines() if line.startswith("in force: "))
    assert line.endswith("precondition_outputs off, masked loss")
    assert "precondition_outputs off, masked loss (beside the masks 0.1)\n" in tenth.out
    assert "masked loss" not in plain.out


def test_a_resumed_run_is_bit_identical(script: Script, masked: Prepared, tmp_path: Path) -> None:
    words = [*MASKED, "--unmasked_weight", 0.1, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    whole = train(script, masked, tmp_path / "whole", *words, "--max_train_steps", 6, "--checkpointing_steps", 6)
    train(script, masked, tmp_path / "parts", *words, "--max_train_steps", 4)
    again = ["--max_train_steps", 6, "--resume_from_checkpoint", "latest"]
    parts = train(script, masked, tmp_path / "parts", *words, *again)
    assert same_lora(whole.folder / LORA_FILE, parts.folder / LORA_FILE)
    assert whole.losses == parts.losses
    states = [each.folder / "checkpoint-6" / "state.safetensors" for each in (whole, parts)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_masks_are_part_of_a_runs_identity(script: Script, masked: Prepared, tmp_path: Path) -> None:
    stage_one = private_copy(masked, tmp_path / "stage_one")
    shutil.copytree(masked.pictures.parent / "masks", tmp_path / "masks")
    words = ["--mask_data_dir", tmp_path / "masks"]
    train(script, stage_one, tmp_path / "out", *MASKED, "--unmasked_weight", 0.1)
    identity = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    assert (identity["--masked_loss"], identity["--unmasked_weight"]) == (True, 0.1)
    again = ["--resume_from_checkpoint", "latest", "--max_train_steps", 5]
    refused = train(script, stage_one, tmp_path / "out", *again, code=2)
    assert (
        "with --masked_loss, and with --unmasked_weight 0.1, not 0.0: type --masked_loss, type --unm" in refused.error
    )
    refused = train(script, stage_one, tmp_path / "out", *MASKED, *again, code=2)
    assert "was trained with --unmasked_weight 0.1, not 0.0: type --unmasked_weight 0.1 to go on" in refused.error
    path = tmp_path / "masks" / "00.png"
    ImageOps.invert(Image.open(path)).save(path)
    refused = train(script, stage_one, tmp_path / "out", *MASKED, *words, *again, code=2)
    assert (
        f"the mask of 00.png is not the one in {stage_one.latents}: type `python precompute_latents.py" in refused.error
    )
    command = shlex.split(refused.error.split("`")[1])
    assert script("precompute_latents", *command[2:]).code == 0
    refused = train(script, stage_one, tmp_path / "out", *MASKED, "--unmasked_weight", 0.1, *words, *again, code=2)
    assert "was trained with other masks: put back the masks of then to go on" in refused.error
    shutil.copy(masked.pictures.parent / "masks" / "00.png", path)
    assert script("precompute_latents", *command[2:]).code == 0
    train(script, stage_one, tmp_path / "out", *MASKED, "--unmasked_weight", 0.1, *words, *again)


def test_a_checkpoint_without_masks_goes_on_without(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """As one of an earlier build, which has neither flag."""
    train(script, prepared, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint-3"
    state = read_state(folder)
    for name in ("--masked_loss", "--unmasked_weight", "the masks"):
        del state["signature"][name]
    write_state(folder, state)
    again = ["--resume_from_checkpoint", "latest", "--max_train_steps", 4]
    assert len(train(script, prepared, tmp_path / "out", *again).losses) == 4


def test_latents_with_masks_are_made_on_the_way(script: Script, masked: Prepared, tmp_path: Path) -> None:
    """In buckets, from one command; the weights have each batch's shape."""
    words = ["--latents_path", tmp_path / "latents", "--mask_data_dir", masked.pictures.parent / "masks"]
    run = train(script, masked, tmp_path / "out", *MASKED, *words, "--use_aspect_ratio_bucket", "--max_train_steps", 5)
    assert len(run.losses) == 5
    shapes = {
        values.shape[1:]
        for path in (tmp_path / "latents").glob("*.safetensors")
        for name, values in load_file(path).items()
        if name.endswith(".mask")
    }
    assert len(shapes) > 1


def test_the_plan_counts_the_weights() -> None:
    shape = StepShape(2, (64, 64), 97, None, None, 4, 0.0, torch.float16, 16)
    config = json.loads((MINIATURE / "transformer" / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    plain, masked = (replace(shape, masked=value) for value in (False, True))
    assert _hollow_inputs(config, masked).loss_weights.shape == (2, 1, 64, 64)
    peaks = [sum(simulate_step(config, each, None, STEP).peak((), False)) for each in (plain, masked)]
    weights = 2 * 64 * 64 * 4
    assert 0.9 * weights < peaks[1] - peaks[0] < 4 * weights


def test_the_plan_is_told(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[TrainingTask] = []
    original = training_script().plan_training
    monkeypatch.setattr(
        training_script(), "plan_training", lambda task, budget: (tasks.append(task), original(task, budget))[1]
    )
    words = ["--pretrained_model_name_or_path", MINIATURE, "--device", "cpu", "--vram_budget_gib", 4, "--plan"]
    for more in ([], MASKED):
        assert script(TRAINING_SCRIPT, *words, *more, "--output_dir", tmp_path).code == 0
    assert [task.shape.masked for task in tasks] == [False, True]


# Bad input


def test_what_is_missing_is_a_sentence(script: Script, masked: Prepared, prepared: Prepared, tmp_path: Path) -> None:
    refused = train(script, prepared, tmp_path / "a", *MASKED, code=2)
    assert f"{prepared.latents} has no mask of 00.png for --masked_loss: add --mask_data_dir with" in refused.error
    stage_one = private_copy(prepared, tmp_path / "stage_one")
    masks = masked.pictures.parent / "masks"
    refused = train(script, stage_one, tmp_path / "b", *MASKED, "--mask_data_dir", masks, code=2)
    assert "has no mask of 00.png for --masked_loss: type `python precompute_latents.py" in refused.error
    assert refused.wrote_no_weights()
    assert script("precompute_latents", *shlex.split(refused.error.split("`")[1])[2:]).code == 0
    train(script, stage_one, tmp_path / "b", *MASKED, "--mask_data_dir", masks)
    refused = train(script, masked, tmp_path / "c", *MASKED, "--mask_data_dir", tmp_path / "nowhere", code=2)
    assert f"there is no folder {tmp_path / 'nowhere'}" in refused.error


def test_masks_that_no_crop_shows(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """At the very side of a wide picture, of which the central crop sees nothing."""
    stage_one = private_copy(prepared, tmp_path / "stage_one")
    (tmp_path / "masks").mkdir()
    for path in stage_one.pictures.glob("*.png"):
        mask = np.zeros(Image.open(path).size[::-1], np.uint8)
        mask[:, :2] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / path.name)
    words = ["--pretrained_model_name_or_path", stage_one.model, "--instance_data_dir", stage_one.pictures]
    words += ["--device", "cpu", "--output_path", stage_one.latents, "--mask_data_dir", tmp_path / "masks"]
    assert script("precompute_latents", *words).code == 0
    refused = train(script, stage_one, tmp_path / "out", *MASKED, "--center_crop", code=2)
    assert re.match(
        r"the crops of 0[03].png show nothing of its mask: take more of them \(--num_crops\)", refused.error
    )
    train(script, stage_one, tmp_path / "out", *MASKED)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--unmasked_weight", 0.1], "--unmasked_weight has no effect without --masked_loss: add that, or leave"),
        (["--alpha_mask"], "--alpha_mask has no effect without --masked_loss"),
        (["--mask_data_dir", "m"], "--mask_data_dir has no effect without --masked_loss"),
        ([*MASKED, "--mask_data_dir", "m", "--alpha_mask"], "--mask_data_dir and --alpha_mask exclude each other"),
        ([*MASKED, "--unmasked_weight", 1.5], "--unmasked_weight 1.5 must be at least 0 and at most 1"),
        ([*MASKED, "--unmasked_weight", "nan"], "--unmasked_weight nan must be at least 0 and at most 1"),
    ],
)
def test_flags_that_cannot_be(script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str) -> None:
    assert says in train(script, prepared, tmp_path / "out", *words, code=2).err
