"""A LoRA of the CLIPs: its gradients, its file, exact resume, and what goes with it or is refused."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.common.records import StepInputs
from sd3_lora.gpu.budget import DeviceBudget
from sd3_lora.plan.memory_plan import Plan, each_plan
from sd3_lora.plan.step_memory import simulate_step
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.training.checkpoints import read_state
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.prior_flags import PriorConfig
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE, attach_lora, target_modules
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.streaming import StreamedBlocks
from sd3_lora.transformer.trained_clips import ClipTraining, TrainedClips
from sd3_lora.transformer.velocity import VelocityModel

import numpy as np
import pytest
import torch
from conftest import PROMPT, TRAINING_SCRIPT, Prepared
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from test_resume import Interrupted, assert_same_run, interrupt
from training_runs import Script, train
from transformers import CLIPTextModelWithProjection

TRAINS = ["--train_text_encoder", "--text_encoder_lr", 0.02, "--learning_rate", 0.01]


def of_clips(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("text_encoder")}


# Gradients


def randomize(parameters: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def inputs_of(pipeline: StableDiffusion3Pipeline) -> tuple[StepInputs, list[torch.Tensor]]:
    """Two pictures, of the second CLIP-G's part dropped; and the token ids of each CLIP."""
    prompts, generator = [PROMPT, "a red robot"], torch.Generator().manual_seed(6)
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    ids = [tokenizer(prompts, **options).input_ids for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]
    latents, noise = torch.randn(2, 2, 16, 8, 8, generator=generator)
    sigmas = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1)
    embeds, pooled = torch.randn(2, 97, 48, generator=generator), torch.randn(2, 24, generator=generator)
    none = torch.empty(0, dtype=torch.long)
    kept = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    timesteps = 1000 * sigmas.flatten()
    inputs = StepInputs(latents, noise, sigmas, timesteps, embeds, pooled, torch.ones(2), none, clip_kept=kept)
    return inputs, ids


def test_gradients_are_those_of_a_plain_loop(tiny_sd3: Path) -> None:
    """The stock encoders under peft's own LoRA, joined as `encode_prompt` does, in float32; nothing recomputed."""
    micro_step = importlib.import_module(TRAINING_SCRIPT).micro_step
    ours, stock = (StableDiffusion3Pipeline.from_pretrained(tiny_sd3) for _ in range(2))
    gradients, losses = [], []
    for pipeline in (ours, stock):
        clips = {name: getattr(pipeline, name) for name in CLIPS}
        parameters = ClipTraining({}, 3).attach(clips)
        count = len(parameters)
        transformer = pipeline.transformer
        parameters += attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.0, 0)
        randomize(parameters)
        inputs, ids = inputs_of(pipeline)
        if pipeline is ours:
            model = VelocityModel(transformer, torch.float32, clips=TrainedClips(clips)).train()
            flow = FlowConfig(weighting_scheme="none", precondition_outputs=False)
            states, ends = model.clips.embed(torch.stack(ids, 1))
            loss = micro_step(model, inputs._replace(clip_states=states, clip_ends=ends), flow, PriorConfig())
        else:
            outputs = [clip(each, output_hidden_states=True) for clip, each in zip(clips.values(), ids, strict=True)]
            hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            pooled = torch.cat([output[0] for output in outputs], dim=-1)
            shown = torch.cat([torch.ones(2, 8), torch.tensor([[1.0], [0.0]]).expand(2, 16)], 1)  # CLIP-G's is dropped
            hidden, pooled = hidden * shown[:, None], pooled * shown
            hidden = torch.nn.functional.pad(hidden, (0, 48 - 24))
            noisy = (1 - inputs.sigmas) * inputs.latents + inputs.sigmas * inputs.noise
            velocity = transformer(
                hidden_states=noisy,
                timestep=inputs.timesteps,
                encoder_hidden_states=torch.cat([hidden, inputs.prompt_embeds[:, 77:]], dim=1),
                pooled_projections=pooled,
            ).sample
            loss = (velocity - (inputs.noise - inputs.latents)).square().mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in parameters])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max() + 1))
    assert all(float(gradient.abs().max()) > 1e-5 for gradient in gradients[1][:count])


# A run, and its file


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of both, with an average, exports and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*prepared.flags, "--device", "cpu", "--max_train_steps", 4, "--output_dir", folder, *TRAINS, "--use_ema"]
    words += ["--text_encoder_rank", 3, "--export", "kohya,a1111", "--ema_decay", 0.5]
    words += ["--validation_prompt", PROMPT, "--validation_num_steps", 3, "--validation_guidance", 4]
    assert importlib.import_module(TRAINING_SCRIPT).main([str(word) for word in words]) == 0
    return folder


def test_the_file(trained: Path) -> None:
    """diffusers' names; the CLIPs' attention in every layer, with their own rank; all of it trained."""
    for name in (LORA_FILE, EMA_FILE):
        clips = of_clips(load_file(trained / name))
        layers = {key.rpartition(".lora_")[0] for key in clips}
        attention = ("k_proj", "out_proj", "q_proj", "v_proj")
        assert layers == {
            f"{clip}.text_model.encoder.layers.{layer}.self_attn.{projection}"
            for clip in CLIPS
            for layer in (0, 1)
            for projection in attention
        }
        assert {len(tensor) for key, tensor in clips.items() if ".lora_A." in key} == {3}
        assert all(tensor.any() for tensor in clips.values())
    record = json.loads((trained / "run.json").read_text())
    assert record["identity"]["--text_encoder_lr"] == 0.02


def drawn(script: Script, prepared: Prepared, outdir: Path, lora: Path) -> np.ndarray:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings, "--lora", lora]
    flags += ["--outdir", outdir, "--num_steps", 3, "--guidance", 4, "--prompt", PROMPT, "--device", "cpu"]
    result = script("inference", *flags)
    assert result.code == 0, result.err
    (path,) = outdir.glob("0*/*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_the_same_picture_everywhere(script: Script, prepared: Prepared, tmp_path: Path, trained: Path) -> None:
    """The stock pipeline's, ours, of each export, and the one that was drawn while training (with the average)."""
    from sd3_lora.drawing.pictures import plan_pictures

    pipeline = StableDiffusion3Pipeline.from_pretrained(prepared.model)
    pipeline.set_progress_bar_config(disable=True)
    (plan,) = plan_pictures(tmp_path, [PROMPT], 1, {"seed": 0})
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 20}
    latents = plan.noise((16, 8, 8))[None]

    def stock() -> np.ndarray:
        (picture,) = pipeline(PROMPT, latents=latents, height=64, width=64, output_type="np", **settings).images
        return (picture * 255).round().astype(int)

    base = stock()
    pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    expected = stock()
    assert np.abs(base - expected).mean() > 2
    assert np.abs(drawn(script, prepared, tmp_path / "ours", trained) - expected).max() <= 2
    for form in ("kohya", "a1111"):
        path = trained / LORA_FILE.replace(".", f"_{form}.")
        assert np.abs(drawn(script, prepared, tmp_path / form, path) - expected).max() <= 2
    (picture,) = (trained / "samples" / "step_000004").glob("*.png")
    average = drawn(script, prepared, tmp_path / "average", trained / EMA_FILE)
    assert np.abs(np.asarray(Image.open(picture)).astype(int) - average).max() <= 2
    assert np.abs(average - expected).max() > 2


def test_pictures_change_no_number(script: Script, prepared: Prepared, tmp_path: Path, trained: Path) -> None:
    words = [*TRAINS, "--text_encoder_rank", 3, "--max_train_steps", 4, "--use_ema", "--ema_decay", 0.5]
    run = train(script, prepared, tmp_path, *words)
    assert (run.folder / LORA_FILE).read_bytes() == (trained / LORA_FILE).read_bytes()


# Flags


def test_each_flag_has_its_effect(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """The rate and the weight decay of the CLIPs change theirs alone in the first step."""
    words = [*TRAINS, "--max_train_steps", 1]

    def run(name: str, *more: object) -> dict[str, torch.Tensor]:
        return train(script, prepared, tmp_path / name, *words, *more).lora

    plain = run("plain")
    for flag, value in (("text_encoder_lr", 0.001), ("adam_weight_decay_text_encoder", 5.0)):
        other = run(flag, f"--{flag}", value)
        assert all(torch.equal(plain[key], other[key]) for key in plain.keys() - of_clips(plain).keys())
        assert any(not torch.equal(plain[key], other[key]) for key in of_clips(plain)), flag
    assert {len(tensor) for key, tensor in of_clips(plain).items() if ".lora_A." in key} == {4}
    own = [*words, "--text_encoder_rank", 2]
    assert {
        len(tensor)
        for key, tensor in of_clips(train(script, prepared, tmp_path / "rank", *own).lora).items()
        if ".lora_A." in key
    } == {2}
    again = train(script, prepared, tmp_path / "without", "--learning_rate", 0.01, "--max_train_steps", 1).lora
    assert not of_clips(again)
    assert again.keys() == plain.keys() - of_clips(plain).keys()


def test_scaled_rates_and_prodigy(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """--scale_lr scales both; prodigy has one rate, that of the CLIPs too."""
    words = ["--train_text_encoder", "--train_batch_size", 2, "--scale_lr"]
    run = train(script, prepared, tmp_path / "scaled", *words)
    assert "learning rate 0.0002 constant" in run.out
    assert "CLIPs' learning rate 1e-05" in run.out
    run = train(script, prepared, tmp_path / "prodigy", "--train_text_encoder", "--optimizer", "prodigy")
    assert "CLIPs' learning rate 1\n" in run.out
    words = ["--train_text_encoder", "--optimizer", "prodigy", "--text_encoder_lr", 0.5]
    assert "type --text_encoder_lr 1," in train(script, prepared, tmp_path / "two", *words, code=2).error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text_encoder_lr", 1e-4], "--text_encoder_lr 0.0001 is of --train_text_encoder: add that, or leave it out"),
        (["--stop_text_encoder_after", 0.5], "--stop_text_encoder_after 0.5 is of --train_text_encoder"),
        ([*TRAINS, "--stop_text_encoder_after", 1.5], "is a share of the steps, between 0 and 1: type for example 0.5"),
        ([*TRAINS, "--text_encoder_rank", 0], "--text_encoder_rank 0 must be at least 1"),
        ([*TRAINS, "--lora_type", "lokr"], "--train_text_encoder trains a plain LoRA"),
        (["--stream_text_encoders", "on"], "--stream_text_encoders on is of CLIPs of which something is trained"),
        ([*TRAINS, "--modulations_ahead", "on", "--stream_blocks", 2], "--modulations_ahead on computes from prompts"),
        (
            ["--train_text_encoder", "--stop_text_encoder_after", 0.5, "--optimizer", "prodigy"],
            "--stop_text_encoder_after does not go with --optimizer prodigy",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_go_together(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str
) -> None:
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert says in run.error
    assert run.wrote_no_weights()


def test_training_stops_after_a_share_of_the_steps(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """The CLIPs' LoRA stays as it was then, bit for bit, and the transformer's goes on; resumed before and after."""
    words = [*TRAINS, "--max_train_steps", 6, "--save_every_n_steps", 1, "--stop_text_encoder_after", 0.5]
    words += ["--checkpointing_steps", 2, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2]
    run = train(script, prepared, tmp_path / "whole", *words)
    by_step = [load_file(run.folder / f"whole-step{step:08d}.safetensors") for step in range(1, 7)]
    for (before, after), step in zip(pairwise(by_step), range(2, 7), strict=True):
        same = all(torch.equal(before[key], after[key]) for key in of_clips(before))
        assert same == (step > 3)
        others = before.keys() - of_clips(before).keys()
        assert not all(torch.equal(before[key], after[key]) for key in others)
    for step in (2, 4):
        folder = tmp_path / f"resumed{step}"
        checkpoint = run.folder / f"checkpoint-{step}"
        train(script, prepared, folder, *words, "--resume_from_checkpoint", checkpoint)
        assert (folder / LORA_FILE).read_bytes() == (run.folder / LORA_FILE).read_bytes()
    longer = [*words, "--max_train_steps", 8, "--resume_from_checkpoint", "latest"]
    error = train(script, prepared, run.folder, *longer, code=2).error
    assert "was to leave the CLIPs as they are after step 3, of 6, and this command after step 4" in error


# What they go with


def test_an_interrupted_run_ends_with_the_same_bits(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that draws: dropout of the LoRA, of captions and of encoders, an average, and prior prompts."""
    words = [*TRAINS, "--max_train_steps", 6, "--checkpointing_steps", 2, "--lora_dropout", 0.3, "--use_ema"]
    words += ["--gradient_accumulation_steps", 2, "--caption_dropout", 0.3, "--clip_l_dropout", 0.3]
    words += ["--clip_g_dropout", 0.3, "--t5_dropout", 0.3, "--prior_term", "prediction", "--prior_share", 0.5]
    words += ["--train_batch_size", 2]
    whole = train(script, prepared, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        interrupt(patch, 9)
        with pytest.raises(Interrupted):
            train(script, prepared, tmp_path / "killed", *words)
    torch.manual_seed(12345)
    train(script, prepared, tmp_path / "killed", *words, "--resume_from_checkpoint", "latest")
    assert_same_run(whole.folder, tmp_path / "killed", 6)
    state = read_state(tmp_path / "killed" / "checkpoint-6")
    assert state["clips"].keys() == set(CLIPS)


@pytest.mark.parametrize(
    "words",
    [
        ["--prior_term", "preference"],
        ["--prior_term", "prediction"],
        ["--train_batch_size", 2, "--mixed_precision", "bf16"],
        ["--use_8bit_adam"],
        ["--use_dora"],
        ["--optimizer", "adafactor"],
        ["--optimizer", "schedule_free_adamw"],
        ["--lora_blocks", "1", "--recompute_blocks", 2],
        ["--stream_blocks", 2, "--recompute_blocks", 2],
        ["--base_precision", "nf4"],
        ["--lr_pattern", "attn.to_q=1e-3"],
        ["--init_lora_weights", "pissa"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_what_goes_with_it(script: Script, prepared: Prepared, tmp_path: Path, words: list[Any]) -> None:
    """The CLIPs are trained, the same in each run, and otherwise than without."""
    first = train(script, prepared, tmp_path / "first", *TRAINS, *words)
    second = train(script, prepared, tmp_path / "second", *TRAINS, *words)
    assert first.losses == second.losses
    assert all(tensor.any() for tensor in of_clips(first.lora).values())
    plain = train(script, prepared, tmp_path / "plain", "--learning_rate", 0.01, *words)
    mine, without = first.losses, plain.losses
    assert mine[0]["loss"] == pytest.approx(without[0]["loss"], rel=0.02)  # the parquet's are rounded to float16
    assert mine[2]["loss"] != without[2]["loss"]


def test_streamed_and_recomputed_are_the_same_numbers(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a LoRA of the last block alone: gradients go through the blocks before it too."""
    stream, streams = TrainedClips.stream, list[StreamedBlocks]()

    def noted(clips: TrainedClips, device: torch.device) -> StreamedBlocks:
        streams.append(stream(clips, device))
        return streams[-1]

    monkeypatch.setattr(TrainedClips, "stream", noted)
    words = [*TRAINS, "--lora_blocks", 1, "--lora_dropout", 0.2]
    plain = train(script, prepared, tmp_path / "plain", *words)
    for name, more in (
        ("recomputed", ["--recompute_blocks", 2]),
        ("streamed", ["--recompute_blocks", 1, "--stream_blocks", 2]),
        ("offloaded", ["--recompute_blocks", 2, "--offload_inputs", "on", "--stream_blocks", 1]),
        ("CLIPs too", ["--recompute_blocks", 1, "--stream_blocks", 2, "--stream_text_encoders", "on"]),
        ("CLIPs alone", ["--stream_text_encoders", "on"]),
    ):
        run = train(script, prepared, tmp_path / name, *words, *more)
        assert run.losses == plain.losses, name
        assert (run.folder / LORA_FILE).read_bytes() == (plain.folder / LORA_FILE).read_bytes()
        assert ("the CLIPs streamed" in run.out) == name.startswith("CLIPs")
        assert [each.copies > 0 for each in streams] == ([True] if name.startswith("CLIPs") else [])
        streams.clear()


def test_class_pictures_and_resume_refused_without(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Class pictures have their prompt encoded too; a run is not resumed without its CLIPs."""
    words = [*TRAINS, "--with_prior_preservation", "--class_prompt", "a photo of a robot", "--class_data_dir"]
    words += [tmp_path / "class", "--num_class_images", 2]
    run = train(script, prepared, tmp_path / "run", *words)
    assert all(tensor.any() for tensor in of_clips(run.lora).values())
    plain = [*words[len(TRAINS) :], "--learning_rate", 0.01, "--resume_from_checkpoint", "latest"]
    error = train(script, prepared, run.folder, *plain, "--max_train_steps", 5, code=2).error
    assert "was trained with --train_text_encoder" in error


def test_the_early_warning_measures_with_the_clips(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """A LoRA of the CLIPs that alone is trained lets the class drift; the run is as if nothing had been measured."""
    words = [*TRAINS, "--learning_rate", 1e-12, "--lora_dropout", 0.3]
    run = train(script, prepared, tmp_path / "with", *words, "--early_warning_steps", 1)
    lines = [json.loads(line) for line in (run.folder / "early_warning.jsonl").read_text().splitlines()]
    drift = [line["class_loss"] for line in lines]
    assert drift[0] < 1e-6  # the base's embeddings are rounded to float16
    assert drift[3] > 100 * drift[0]
    assert run.losses == train(script, prepared, tmp_path / "without", *words).losses


def test_training_begins_with_a_lora_of_the_clips(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Its own file, of a smaller rank, and its export; the same picture before the first step."""
    first = train(script, prepared, tmp_path / "first", *TRAINS, "--text_encoder_rank", 3, "--export", "kohya")
    draws = ["--validation_prompt", PROMPT, "--validation_num_steps", 2, "--max_train_steps", 1]
    draws += ["--learning_rate", 1e-12, "--train_text_encoder", "--text_encoder_lr", 1e-12]
    pictures = []
    for name, lora in (("own", LORA_FILE), ("export", LORA_FILE.replace(".", "_kohya."))):
        run = train(script, prepared, tmp_path / name, *draws, "--init_lora", first.folder / lora)
        (picture,) = (run.folder / "samples" / "step_000000").glob("*.png")
        pictures.append(np.asarray(Image.open(picture)).astype(int))
        mine, before = of_clips(run.lora), of_clips(first.lora)
        for key in (key for key in before if ".lora_B." in key):
            product, expected = (each[key] @ each[key.replace("lora_B", "lora_A")] for each in (mine, before))
            torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-4)
    plain = train(script, prepared, tmp_path / "plain", *draws)
    (picture,) = (plain.folder / "samples" / "step_000000").glob("*.png")
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - np.asarray(Image.open(picture)).astype(int)).mean() > 1
    words = [*TRAINS, "--init_lora", first.folder, "--text_encoder_rank", 2]
    error = train(script, prepared, tmp_path / "smaller", *words, code=2).error
    assert "and this command 2: type --text_encoder_rank 3" in error
    error = train(script, prepared, tmp_path / "without", "--init_lora", first.folder, code=2).error
    assert "has LoRA layers of text encoders" in error


# The plan


def test_the_plan_counts_the_clips(miniature_files: Any) -> None:
    """Their weights, their LoRA, and what more the blocks keep: those before the first LoRA too."""
    module, config = importlib.import_module(TRAINING_SCRIPT), miniature_files.read_config("transformer")

    def simulated(*words: str) -> Any:
        flags = TrainingFlags(*module.COMMAND_LINE.parse(list(words)))
        device = torch.device("cpu")
        task = module.training_task(flags, miniature_files, Buckets.square(64), torch.float16, device, 1)
        assert (task.asked.modulations_ahead is False) == ("--train_text_encoder" in words)
        return simulate_step(config, task.shape, None, task.step)

    clips, late = "--train_text_encoder", ("--lora_blocks", "5")
    plain, both, wider = simulated(), simulated(clips), simulated(clips, "--text_encoder_rank", "8")
    assert (plain.clips, both.clips) == (0, wider.clips)
    models = [CLIPTextModelWithProjection.from_pretrained(miniature_files.component(name)) for name in CLIPS]
    frozen = sum(p.numel() for model in models for name, p in model.named_parameters() if ".embeddings." not in name)
    assert both.clips == 2 * frozen
    layers = [(model.config.num_hidden_layers, model.config.hidden_size) for model in models]
    of_clips = 4 * sum(4 * 2 * 4 * count * width for count, width in layers)
    assert both.lora - plain.lora == of_clips
    assert wider.lora - plain.lora == 2 * of_clips
    assert all(mine > other for mine, other in zip(both.kept, plain.kept, strict=True))
    assert both.outside > plain.outside
    alone, with_clips = simulated(*late), simulated(clips, *late)
    assert (alone.kept[0], alone.inputs[0]) == (0, 0)
    assert min(with_clips.kept[0], with_clips.inputs[0]) > 0


def plans(model: str, *words: str) -> list[Plan]:
    """All that may be taken, the fastest first."""
    module, device = importlib.import_module(TRAINING_SCRIPT), torch.device("cpu")
    words = ("--train_text_encoder", "--pretrained_model_name_or_path", model, *words)
    flags = TrainingFlags(*module.COMMAND_LINE.parse(list(words)))
    files = ModelFiles(flags.model, is_plan=True)
    task = module.training_task(flags, files, Buckets.square(64), torch.float16, device, 1)
    return list(each_plan(task, DeviceBudget(8 * GIB, 0, device)))


def test_the_clips_are_streamed_where_streamed_blocks_do_not_make_it_fit() -> None:
    """Of SD3-Medium, whose CLIPs have 1.34 GiB: no plan of the same peak is faster."""
    medium = "stabilityai/stable-diffusion-3-medium-diffusers"
    free, without = plans(medium), plans(medium, "--stream_text_encoders", "off")
    first = next(place for place, plan in enumerate(free) if plan.placement.clips_streamed)
    assert all(plan.placement.clips_streamed for plan in free[first:])
    assert len(free[first - 1].placement.streamed) == free[first - 1].placement.blocks
    assert not any(plan.placement.clips_streamed for plan in without)
    assert without[:first] == free[:first]
    assert without[-1].forecast.peak_bytes - free[-1].forecast.peak_bytes > 1.2 * GIB


def test_the_plan_counts_streamed_clips_to_the_byte(miniature_files: Any) -> None:
    forced, free = (plans(str(MINIATURE), "--stream_text_encoders", switch)[0] for switch in ("on", "off"))
    assert forced.placement.clips_streamed
    assert not forced.placement.streamed
    models = [CLIPTextModelWithProjection.from_pretrained(miniature_files.component(name)) for name in CLIPS]
    clips = dict(zip(CLIPS, (model.half() for model in models), strict=True))
    ClipTraining({}, 4).attach(clips)
    trained = TrainedClips(clips)
    whole, streams = trained.frozen_bytes, trained.stream(torch.device("cpu"))
    left = whole - sum(weight.nbytes for piece in trained.pieces() for weight in piece.weights)
    parts = [plan.forecast.largest.parts["CLIPs"] for plan in (free, forced)]
    assert parts == [whole, left + streams.device_bytes]
    assert forced.forecast.host_bytes == streams.host_bytes


def test_a_run_notes_what_the_clips_take(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path, "--vram_budget_gib", 3, "--train_text_encoder")
    parts = json.loads((run.folder / "run.json").read_text())["predicted_parts"]
    assert parts["CLIPs"] > 0
    assert "CLIPs" in run.out
