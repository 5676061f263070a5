"""Prior preservation: class pictures beside the subject's, one to one, found in their folder or drawn into it.

Shapes: B batch, S text tokens, D joint attention width, P pooled width.
"""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.training.class_images import shared_out
from sd3_lora.training.pool import with_class_pool
from sd3_lora.transformer.lora import LORA_FILE, read_lora_record

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROMPT, Prepared, save_pictures
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from safetensors.torch import load_file
from training_runs import Run, Script, patch_loss, same_lora, train, training_script

CLASS_PROMPT = "a photo of a robot"


@pytest.fixture(scope="module")
def with_class(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    """A stage one with eight class pictures and their latents, once for all tests; they must not write to it."""
    folder = tmp_path_factory.mktemp("class")
    shutil.copytree(prepared.latents, folder / "latents")
    save_pictures(folder / "robots", [(64, 64)] * 7 + [(96, 64)], seed=1)
    words = ["--pretrained_model_name_or_path", prepared.model, "--instance_data_dir", prepared.pictures]
    words += ["--class_data_dir", folder / "robots", "--output_path", folder / "latents", "--device", "cpu"]
    assert importlib.import_module("precompute_latents").main([str(word) for word in words]) == 0
    return replace(prepared, latents=folder / "latents"), folder / "robots"


def flags(folder: Path, count: int = 8, *more: object) -> list[object]:
    words = ["--with_prior_preservation", "--class_prompt", CLASS_PROMPT, "--class_data_dir", folder]
    return [*words, "--num_class_images", count, *more]


def ids_of(folder: Path) -> list[str]:
    return sorted(hash_file(path) for path in folder.glob("*.png"))


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.losses]


# The loss


def test_the_whole_transformer_begins_with_the_same_losses(
    script: Script, with_class: tuple[Prepared, Path], tmp_path: Path
) -> None:
    """A new LoRA changes nothing, so that the first loss is the base's, class pictures included."""
    prepared, robots = with_class
    words = [*flags(robots), "--train_batch_size", 2, "--max_train_steps", 2, "--learning_rate", 1e-3]
    lora = losses(train(script, prepared, tmp_path / "lora", *words))
    whole = losses(train(script, prepared, tmp_path / "whole", *words, "--full"))
    assert whole[0] == pytest.approx(lora[0], rel=1e-6)
    assert whole[1] != pytest.approx(lora[1], rel=1e-6)


def test_a_plain_loop_has_the_same_loss(script: Script, with_class: tuple[Prepared, Path], tmp_path: Path) -> None:
    """A window of two micro-batches of two and two: instance loss + 0.5 × class loss, each a mean over its own."""
    prepared, robots = with_class
    words = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--lora_alpha", 8, "--learning_rate", 1e-12]
    words += flags(robots, 8, "--prior_loss_weight", 0.5)
    run = train(script, prepared, tmp_path, *words, "--max_train_steps", 1)
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer").requires_grad_(False)
    vae_config = json.loads((prepared.model / "vae" / "config.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(prepared.model / "scheduler")
    rows = {row["prompt"]: row for row in pq.read_table(prepared.embeddings).to_pylist()}

    gradients_of = []
    for name in {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in run.lora}:
        lora_a = run.lora[f"transformer.{name}.lora_A.weight"]  # the rate is too small to have moved it
        lora_b = torch.zeros_like(run.lora[f"transformer.{name}.lora_B.weight"], requires_grad=True)
        gradients_of.append(lora_b)

        def add(_module: Any, inputs: Any, output: torch.Tensor, a: Any = lora_a, b: Any = lora_b) -> torch.Tensor:
            return output + 8 / 4 * inputs[0] @ a.T @ b.T

        transformer.get_submodule(name).register_forward_hook(add)

    sources = {PROMPT: ids_of(prepared.pictures), CLASS_PROMPT: ids_of(robots)}
    orders = {
        prompt: torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed, (prompt, ids) in enumerate(sources.items())
    }
    generator = torch.Generator().manual_seed(0)
    window = []
    for start in (0, 2):
        pictures = [(prompt, sources[prompt][orders[prompt][start + i]]) for i in range(2) for prompt in sources]
        which_crop = torch.rand(4, generator=generator)
        posterior_noise, noise = (torch.randn(4, 16, 8, 8, generator=generator) for _ in range(2))
        density = compute_density_for_timestep_sampling("logit_normal", 4, 0.0, 1.0, generator=generator)
        of_prompt: dict[str, list[torch.Tensor]] = {prompt: [] for prompt in sources}
        for i, (prompt, image_id) in enumerate(pictures):
            tensors = load_file(prepared.latents / f"{image_id}.safetensors")
            crops = sorted({name.rsplit(".", 1)[0] for name in tensors})
            crop = crops[int(which_crop[i] * len(crops))]
            raw = tensors[f"{crop}.mean"] + tensors[f"{crop}.std"] * posterior_noise[i]
            latents = (raw - vae_config["shift_factor"]) * vae_config["scaling_factor"]
            index = (density[i] * 1000).long()
            sigma = scheduler.sigmas[index]
            velocity = transformer(
                hidden_states=((1 - sigma) * latents + sigma * noise[i])[None],
                timestep=scheduler.timesteps[index][None],
                encoder_hidden_states=torch.tensor(np.array(rows[prompt]["prompt_embeds"])).float().reshape(1, 97, 48),
                pooled_projections=torch.tensor(np.array(rows[prompt]["pooled_prompt_embeds"])).float()[None],
            ).sample[0]
            of_prompt[prompt].append(((velocity - (noise[i] - latents)) ** 2).mean())
        instance_loss, class_loss = (torch.stack(of_prompt[prompt]).mean() for prompt in sources)
        window.append(instance_loss + 0.5 * class_loss)
    loss = torch.stack(window).mean()
    loss.backward()
    norm = torch.stack([b.grad.norm() for b in gradients_of]).norm()

    (line,) = run.losses
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_weights_of_the_pools() -> None:
    subject, others = ([InstanceImage(name, Path(name), "p")] for name in "ab")
    assert [pool.weight for pool in with_class_pool(subject, others, 0.25)] == [2.0, 0.5]
    assert [pool.role for pool in with_class_pool(subject, others, 0.25)] == ["instance", "class"]
    assert [pool.weight for pool in with_class_pool(subject, [], 0.25)] == [1.0]


@pytest.mark.parametrize(("batch_size", "window"), [(1, 1), (1, 4), (3, 2)])
def test_subject_and_class_meet_one_to_one(
    script: Script,
    with_class: tuple[Prepared, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    window: int,
) -> None:
    """Whatever the pools' sizes; each pool's pictures come equally often, over whole passes of both."""
    prepared, robots = with_class
    seen: list[tuple[str, ...]] = []
    original = training_script().TrainingData.batch

    def batch(*words: Any) -> Any:
        result = original(*words)
        seen.append(result.image_ids)
        return result

    monkeypatch.setattr(training_script().TrainingData, "batch", batch)
    words = ["--train_batch_size", batch_size, "--gradient_accumulation_steps", window]
    steps = 40 // (batch_size * window) or 1
    train(script, prepared, tmp_path, *flags(robots), *words, "--max_train_steps", steps)
    subject, others = ids_of(prepared.pictures), ids_of(robots)
    for ids in seen:
        assert len(ids) == 2 * batch_size
        assert sum(image_id in subject for image_id in ids) == batch_size
    counts = Counter(image_id for ids in seen for image_id in ids)
    for pool in (subject, others):
        times = [counts[image_id] for image_id in pool]
        assert max(times) - min(times) <= 1


def test_an_epoch_is_over_when_each_pool_had_a_pass(
    script: Script, with_class: tuple[Prepared, Path], tmp_path: Path
) -> None:
    """As in diffusers: of five pictures and eight of the class it has eight steps."""
    prepared, robots = with_class
    words = [*prepared.flags, "--device", "cpu", "--num_train_epochs", 1, "--output_dir", tmp_path, *flags(robots)]
    result = script("train_dreambooth_sd3_lora_miniature", *words)
    assert result.code == 0, result.err
    assert len(Run(tmp_path, "", "").losses) == 8


def test_the_weight_and_the_prompt_change_the_numbers(
    script: Script, with_class: tuple[Prepared, Path], tmp_path: Path
) -> None:
    prepared, robots = with_class
    runs = {
        name: train(script, prepared, tmp_path / name, *words)
        for name, words in {
            "without": [],
            "with": flags(robots),
            "again": flags(robots),
            "weight": flags(robots, 8, "--prior_loss_weight", 0.5),
            "fewer": flags(robots, 3),
        }.items()
    }
    assert losses(runs["with"]) == losses(runs["again"])
    assert len({losses(run)[0] for name, run in runs.items() if name != "again"}) == 4


def test_the_class_prompt_is_never_the_subjects(
    script: Script, with_class: tuple[Prepared, Path], tmp_path: Path
) -> None:
    prepared, robots = with_class
    run = train(script, prepared, tmp_path, *flags(robots))
    assert CLASS_PROMPT not in run.out.splitlines()[-1]
    assert run.out.splitlines()[-1].startswith("next: ")
    record = read_lora_record(run.folder / LORA_FILE)
    assert (record["trigger"], record["instance_prompts"]) == (PROMPT, [PROMPT])
    assert CLASS_PROMPT not in (run.folder / "README.md").read_text().partition("## Training")[0]
    assert "5 pictures and 8 class pictures at 64 px" in run.out


# Resume


def test_an_interrupted_run_ends_with_the_same_bits(
    script: Script, with_class: tuple[Prepared, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amid a pass of both pools, in the second micro-batch of a window."""
    prepared, robots = with_class
    words = [*flags(robots), "--gradient_accumulation_steps", 2, "--max_train_steps", 6, "--checkpointing_steps", 3]
    words += ["--learning_rate", 0.01, "--lora_dropout", 0.2]
    whole = train(script, prepared, tmp_path / "whole", *words)

    class Stop(BaseException):
        pass

    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 10:
            raise Stop
        return loss

    with monkeypatch.context() as patch:
        patch_loss(patch, change)
        with pytest.raises(Stop):
            train(script, prepared, tmp_path / "cut", *words)
    resumed = train(script, prepared, tmp_path / "cut", *words, "--resume_from_checkpoint", "latest")
    assert same_lora(whole.folder / LORA_FILE, resumed.folder / LORA_FILE)
    for name in ("state.safetensors", "state.json"):
        left, right = (folder / "checkpoint-6" / name for folder in (whole.folder, resumed.folder))
        assert left.read_bytes() == right.read_bytes()
    assert losses(whole) == losses(resumed)


def test_a_resumed_run_keeps_its_class_pictures_and_weights(
    script: Script, with_class: tuple[Prepared, Path], tmp_path: Path
) -> None:
    prepared, robots = with_class
    train(script, prepared, tmp_path / "with", *flags(robots))
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", 4]
    changes = {
        "leave --prior_loss_weight out": None,
        "type --prior_loss_weight 1.0": flags(robots, 8, "--prior_loss_weight", 0.5),
        "type --num_class_images 8": flags(robots, 5),
        "type --with_prior_preservation": [],
    }
    for says, words in changes.items():
        if words is not None:
            assert says in train(script, prepared, tmp_path / "with", *words, *resume, code=2).error
    train(script, prepared, tmp_path / "without")
    said = train(script, prepared, tmp_path / "without", *flags(robots), *resume, code=2).error
    assert "leave --with_prior_preservation out" in said


# The pictures


def draw_words(prepared: Prepared, folder: Path, latents: Path, count: int) -> list[object]:
    words = ["--pretrained_model_name_or_path", prepared.model, "--class_prompt", CLASS_PROMPT, "--device", "cpu"]
    words += ["--class_data_dir", folder, "--latents_path", latents, "--data_df_path", prepared.embeddings]
    return [*words, "--num_class_images", count, "--num_steps", 2]


def test_missing_pictures_are_drawn_in_a_process_of_its_own(script: Script, private: Prepared, tmp_path: Path) -> None:
    """One picture is there and counts, and is encoded; two are drawn, whose latents no VAE has encoded."""
    save_pictures(tmp_path / "robots", [(64, 64)], seed=1)
    run = train(script, private, tmp_path / "run", *flags(tmp_path / "robots", 3))
    lacks = f"{tmp_path / 'robots'} lacks 2 class pictures yet; in a process of its own: python draw_class_pictures.py"
    assert lacks in run.out
    assert f"{private.latents} lacks class pictures of" in run.out
    drawn = sorted((tmp_path / "robots").glob("class_*.png"))
    assert [path.name for path in drawn] == ["class_0000.png", "class_0001.png"]
    for path in drawn:
        tensors = load_file(private.latents / f"{hash_file(path)}.safetensors")
        assert set(tensors) == {"64x64+0+0.mean", "64x64+0+0.std"}
        assert tensors["64x64+0+0.mean"].dtype == torch.float32
        assert tensors["64x64+0+0.mean"].abs().max() > 0
        assert tensors["64x64+0+0.std"].abs().max() == 0
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
            assert json.loads(picture.text["sd3_lora"])["prompt"] == CLASS_PROMPT  # type: ignore[attr-defined]
    (encoded,) = (tmp_path / "robots").glob("00.png")
    assert load_file(private.latents / f"{hash_file(encoded)}.safetensors")["64x64+0+0.std"].max() > 0
    assert not (private.latents / "undecoded").exists()
    assert "5 pictures and 3 class pictures at 64 px" in run.out


def test_latents_come_straight_from_the_transformer(script: Script, private: Prepared, tmp_path: Path) -> None:
    """The PNG is their decoding."""
    from sd3_lora.common.config import ModelConfig
    from sd3_lora.common.model_files import ModelFiles
    from sd3_lora.stage_one.vae import load_vae

    result = script("draw_class_pictures", *draw_words(private, tmp_path / "robots", private.latents, 1))
    assert result.code == 0, result.err
    (path,) = (tmp_path / "robots").glob("*.png")
    mean = load_file(private.latents / f"{hash_file(path)}.safetensors")["64x64+0+0.mean"]
    vae = load_vae(ModelFiles(ModelConfig(str(private.model))), "fp32", torch.device("cpu"))
    with torch.no_grad():
        pixels = vae.decode(mean[None]).sample[0]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(expected - np.asarray(Image.open(path), dtype=np.float32)).max() <= 1


@pytest.mark.parametrize("at", ["denoising", "decoding", "keeping"])
def test_drawing_goes_on_where_it_stopped(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    module = importlib.import_module("draw_class_pictures")
    whole = [*draw_words(private, tmp_path / "whole", tmp_path / "latents", 5), "--sample_batch_size", 1]
    assert script("draw_class_pictures", *whole).code == 0
    calls: list[int] = []

    def stopping(original: Any) -> Any:
        def call(*words: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*words)

        return call

    words = [*draw_words(private, tmp_path / "cut", private.latents, 5), "--sample_batch_size", 1]
    with monkeypatch.context() as patch:
        if at == "denoising":
            patch.setattr(module.Sampler, "denoise", stopping(module.Sampler.denoise))
        elif at == "decoding":
            patch.setattr(module, "decode", stopping(module.decode))
        else:
            patch.setattr(module.PicturePlan, "write", stopping(module.PicturePlan.write))
        assert script("draw_class_pictures", *words).code == 130
    denoised: list[int] = []
    original = module.Sampler.denoise

    def count(sampler: Any, noise: torch.Tensor, *more: Any) -> torch.Tensor:
        denoised.append(len(noise))
        return original(sampler, noise, *more)

    monkeypatch.setattr(module.Sampler, "denoise", count)
    assert script("draw_class_pictures", *words).code == 0
    assert sum(denoised) == (3 if at == "denoising" else 0)
    pictures = [sorted((tmp_path / name).glob("*.png")) for name in ("whole", "cut")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    assert len(pictures[1]) == 5
    for path in pictures[1]:
        folders = (tmp_path / "latents", private.latents)
        left, right = (load_file(folder / f"{hash_file(path)}.safetensors") for folder in folders)
        assert all(torch.equal(left[name], right[name]) for name in left)
    again = script("draw_class_pictures", *words)
    assert "5 class pictures, 5 of them in" in again.out
    assert sum(denoised) == (3 if at == "denoising" else 0)


def test_a_picture_that_was_deleted_is_drawn_again(script: Script, private: Prepared, tmp_path: Path) -> None:
    words = draw_words(private, tmp_path / "robots", private.latents, 3)
    assert script("draw_class_pictures", *words).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "robots").glob("*.png")}
    (tmp_path / "robots" / "class_0001.png").unlink()
    assert script("draw_class_pictures", *words).code == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "robots").glob("*.png")}
    assert before.keys() == after.keys()
    assert len(set(after.values())) == 3


def test_what_waits_with_other_settings_is_denoised_again(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("draw_class_pictures")
    words = draw_words(private, tmp_path / "robots", private.latents, 2)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode", stop)
        assert script("draw_class_pictures", *words).code == 130
    assert script("draw_class_pictures", *words, "--seed", 7).code == 0
    for path in (tmp_path / "robots").glob("*.png"):
        assert json.loads(Image.open(path).text["sd3_lora"])["seed"] == 7  # type: ignore[attr-defined]


def test_the_flags_of_drawing_reach_it(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--sample_batch_size, --prior_generation_precision and the budget."""
    commands: list[list[str]] = []

    def run(words: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append([str(word) for word in words[1:]])
        return subprocess.CompletedProcess(words, 2)

    monkeypatch.setattr("sd3_lora.training.stage_one_request.subprocess.run", run)
    more = ["--sample_batch_size", 2, "--prior_generation_precision", "bf16", "--vram_budget_gib", 4]
    said = train(script, private, tmp_path / "run", *flags(tmp_path / "robots", 3, *more), code=2).error
    assert "there are no class pictures to train on: mend what is said above, then type `python draw_class_pic" in said
    (words,) = commands
    pairs = dict(zip(words[1::2], words[2::2], strict=True))
    assert Path(words[0]).name == "draw_class_pictures.py"
    assert pairs["--sample_batch_size"] == "2"
    assert pairs["--prior_generation_precision"] == "bf16"
    assert pairs["--vram_budget_gib"] == "4.0"
    assert pairs["--num_class_images"] == "3"
    assert (pairs["--resolution"], pairs["--seed"]) == ("64", "0")


def test_several_processes_do_not_wait_for_pictures(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    """torch gives up on a rank that draws for longer than ten minutes; the command draws them."""
    accelerator = training_script().Accelerator
    monkeypatch.setattr(accelerator, "num_processes", 2)
    said = train(script, private, tmp_path / "run", *flags(tmp_path / "robots", 2), code=2).error
    assert f"{tmp_path / 'robots'} lacks 2 class pictures, which are drawn before several processes start: type" in said
    assert in_process == []
    words = shlex.split(said.split("`")[1])
    assert script(words[1].removesuffix(".py"), *words[2:], "--num_steps", 1).code == 0
    monkeypatch.undo()
    train(script, private, tmp_path / "run", *flags(tmp_path / "robots", 2))


def test_the_precision_changes_the_pictures(script: Script, private: Prepared, tmp_path: Path) -> None:
    for precision in ("fp32", "no", "bf16"):
        words = draw_words(private, tmp_path / precision, tmp_path / f"latents-{precision}", 1)
        result = script("draw_class_pictures", *words, "--prior_generation_precision", precision)
        assert result.code == 0, result.err
        assert f"denoise ({'bf16' if precision == 'bf16' else 'fp32'}), 4 at a time" in result.out
    names = ("fp32", "no", "bf16")
    pictures = [np.asarray(Image.open(tmp_path / name / "class_0000.png")).tobytes() for name in names]
    assert pictures[0] == pictures[1] != pictures[2]


def test_fewer_are_drawn_together_where_the_budget_is_small(
    private: Prepared, without_allowances: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd3_lora.common.config import ModelConfig
    from sd3_lora.common.model_files import ModelFiles
    from sd3_lora.drawing.config import ClassDrawingConfig
    from sd3_lora.gpu.budget import BudgetTooSmall

    module = importlib.import_module("draw_class_pictures")
    config = ClassDrawingConfig(class_prompt="a", class_data_dir="b", sample_batch_size=8)
    rows: list[int] = []

    def plan(_files: Any, shape: Any, _budget: Any) -> str:
        rows.append(shape.batch_size)
        if shape.batch_size > 2 * least:
            raise BudgetTooSmall("too small", 1)
        return "plan"

    monkeypatch.setattr(module, "plan_denoising", plan)
    files = ModelFiles(ModelConfig(str(private.model)))
    least = 2
    assert module.plan_drawing(files, config, (8, 8), 97, torch.float32, None) == ("plan", 2)
    assert rows == [16, 8, 4]
    least = 0
    with pytest.raises(BudgetTooSmall):
        module.plan_drawing(files, config, (8, 8), 97, torch.float32, None)


def test_more_pictures_than_asked_for_are_left_out(
    script: Script, private: Prepared, tmp_path: Path, in_process: list[str]
) -> None:
    save_pictures(tmp_path / "robots", [(64, 64)] * 4, seed=1)
    shutil.copy(tmp_path / "robots" / "00.png", tmp_path / "robots" / "01a.png")  # counts once
    run = train(script, private, tmp_path / "run", *flags(tmp_path / "robots", 3))
    assert in_process == ["precompute_latents"]
    assert "5 pictures and 3 class pictures" in run.out
    assert not (private.latents / f"{hash_file(tmp_path / 'robots' / '03.png')}.safetensors").exists()


def test_captions_beside_class_pictures_are_not_read(
    script: Script, private: Prepared, tmp_path: Path, in_process: list[str]
) -> None:
    save_pictures(tmp_path / "robots", [(64, 64)] * 2, seed=1)
    (tmp_path / "robots" / "00.txt").write_text("an unknown caption")
    train(script, private, tmp_path / "run", *flags(tmp_path / "robots", 2))
    assert in_process == ["precompute_latents"]


# The plan


def test_the_plan_counts_both(
    script: Script, with_class: tuple[Prepared, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, robots = with_class
    shapes: list[int] = []
    original = training_script().StepShape

    def shape(batch_size: int, *more: Any, **named: Any) -> Any:
        shapes.append(batch_size)
        return original(batch_size, *more, **named)

    monkeypatch.setattr(training_script(), "StepShape", shape)
    words = [*prepared.flags, "--device", "cpu", "--train_batch_size", 3, "--plan", "--output_dir", tmp_path]
    for more in ([], flags(robots)):
        assert script("train_dreambooth_sd3_lora_miniature", *words, *more).code == 0
    assert shapes == [3, 6]


# What a user may do wrong

BAD_FLAGS: list[tuple[list[object], str]] = [
    (["--class_data_dir", "robots"], "--class_data_dir has no effect without --with_prior_preservation: add that"),
    (["--class_prompt", "a robot"], "--class_prompt has no effect without --with_prior_preservation"),
    (["--num_class_images", 7], "--num_class_images has no effect without --with_prior_preservation"),
    (["--prior_loss_weight", 0.5], "--prior_loss_weight has no effect without --with_prior_preservation"),
    (["--prior_generation_precision", "fp16"], "--prior_generation_precision has no effect without"),
    (["--sample_batch_size", 2], "--sample_batch_size has no effect without --with_prior_preservation"),
    (["--with_prior_preservation", "--class_prompt", "a"], "needs a folder of class pictures, or an empty one"),
    (["--with_prior_preservation", "--class_data_dir", "robots"], 'type --class_prompt "a photo of a dog"'),
    ([*flags(Path("robots")), "--prior_loss_weight", -1], "--prior_loss_weight -1 must be a finite number, not"),
    ([*flags(Path("robots")), "--prior_loss_weight", "nan"], "--prior_loss_weight nan must be a finite number"),
    (flags(Path("robots"), 0), "--num_class_images 0 must be at least 1"),
    ([*flags(Path("robots")), "--sample_batch_size", 0], "--sample_batch_size 0 must be at least 1"),
]


@pytest.mark.parametrize(("words", "says"), BAD_FLAGS, ids=[says[:50] for _, says in BAD_FLAGS])
def test_bad_flags(script: Script, prepared: Prepared, tmp_path: Path, words: list[object], says: str) -> None:
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert says in run.error
    assert not (tmp_path / "out").exists()


def test_the_class_folder_is_not_the_subjects(script: Script, private: Prepared, tmp_path: Path) -> None:
    said = train(script, private, tmp_path / "out", *flags(private.pictures / "."), code=2).error
    assert "is the folder of the subject's pictures: give class pictures a folder of their own" in said
    inner = flags(private.pictures / "class")
    said = train(script, private, tmp_path / "out", *inner, "--recursive", code=2).error
    assert "lies in the folder of the subject's pictures" in said
    assert not (tmp_path / "out").exists()
    assert not (private.pictures / "class").exists()


def test_a_picture_of_the_subject_is_no_class_picture(
    script: Script, private: Prepared, tmp_path: Path, in_process: list[str]
) -> None:
    save_pictures(tmp_path / "robots", [(64, 64)], seed=3)
    shutil.copy(private.pictures / "01.png", tmp_path / "robots" / "mine.png")
    run = train(script, private, tmp_path / "out", *flags(tmp_path / "robots", 2), code=2)
    assert run.error.startswith(f"{tmp_path / 'robots' / 'mine.png'} is also a picture of the subject: the pictures of")
    assert run.wrote_no_weights()
    assert in_process == []


def test_a_class_prompt_without_embedding(script: Script, private: Prepared, tmp_path: Path) -> None:
    words = ["--with_prior_preservation", "--class_prompt", "a photo of a fish", "--class_data_dir", tmp_path / "fish"]
    said = train(script, private, tmp_path / "out", *words, code=2).error
    assert f"{private.embeddings} lacks 'a photo of a fish': type `python compute_embeddings.py" in said
    assert "--class_prompt 'a photo of a fish'" in said
    assert not (tmp_path / "fish").exists()


def test_a_class_folder_that_is_a_file(script: Script, private: Prepared, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = train(script, private, tmp_path / "out", *flags(tmp_path / "file"), code=2).error
    assert said == f"{tmp_path / 'file'} is a file, not a folder: give a folder as --class_data_dir"


def test_encoding_an_empty_class_folder(script: Script, private: Prepared, tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", private.model, "--instance_data_dir", private.pictures]
    words += ["--output_path", private.latents, "--device", "cpu", "--class_data_dir", tmp_path / "none"]
    result = script("precompute_latents", *words)
    assert result.code == 2
    assert f"{tmp_path / 'none'} holds no class pictures: check the path, or leave out --class_data_dir" in result.err


def test_drawing_needs_its_prompt_and_folder(script: Script, private: Prepared, tmp_path: Path) -> None:
    result = script("draw_class_pictures", "--guidance", "inf")
    assert result.code == 2
    for says in ('type --class_prompt "a photo of a dog"', "type --class_data_dir FOLDER", "--guidance inf must be"):
        assert says in result.err
    words = draw_words(private, tmp_path / "fish", private.latents, 1)
    words[words.index(CLASS_PROMPT)] = "a photo of a fish"
    result = script("draw_class_pictures", *words)
    assert result.code == 2
    assert "lacks 'a photo of a fish': type `python compute_embeddings.py" in result.err
    assert not (tmp_path / "fish").exists()


# Pictures of several shapes


@pytest.fixture
def mixed(private: Prepared, tmp_path: Path) -> Prepared:
    """The five pictures in three shapes: 80x48, twice 64x64, twice 48x80."""
    words = ["--pretrained_model_name_or_path", private.model, "--instance_data_dir", private.pictures]
    words += ["--use_aspect_ratio_bucket", "--num_crops", 1, "--device", "cpu", "--output_path", tmp_path / "mixed"]
    assert importlib.import_module("precompute_latents").main([str(word) for word in words]) == 0
    return replace(private, latents=tmp_path / "mixed")


def test_class_pictures_are_drawn_in_the_subjects_shapes(
    script: Script, mixed: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    """In proportion. One square one is there, and one whose shape the subject does not have."""
    robots, seen = tmp_path / "robots", []
    save_pictures(robots, [(64, 64), (128, 32)], seed=1)
    original = training_script().TrainingData.batch

    def batch(*words: Any) -> Any:
        result = original(*words)
        seen.append((result.image_ids, tuple(result.latent_mean.shape[2:])))
        return result

    monkeypatch.setattr(training_script().TrainingData, "batch", batch)
    words = ["--use_aspect_ratio_bucket", *flags(robots, 7), "--train_batch_size", 2]
    run = train(script, mixed, tmp_path / "run", *words, "--num_train_epochs", 1, "--max_train_steps", 9)
    assert in_process == ["precompute_latents", *["draw_class_pictures"] * 3]
    sizes = Counter(Image.open(path).size for path in robots.glob("class_*.png"))
    assert sizes == {(48, 80): 2, (64, 64): 2, (80, 48): 1}
    assert f"{robots} lacks 2 class pictures of 48x80 px yet; in a process of its own: python draw_class" in run.out
    assert "--width 48 --height 80" in run.out
    assert "note: left out: 1 class picture of shapes that no picture of the subject has" in run.out
    assert "5 pictures and 6 class pictures at 64 px" in run.out
    subject = set(ids_of(mixed.pictures))
    for ids, _ in seen:
        assert [image_id in subject for image_id in ids] == [True, False] * (len(ids) // 2)
    assert {shape for _, shape in seen} == {(10, 6), (6, 10), (8, 8)}
    again = train(script, mixed, tmp_path / "again", *words, "--max_train_steps", 9)
    assert len(in_process) == 4
    assert again.losses == run.losses


def test_a_resumed_run_of_several_shapes_has_the_same_bits(
    script: Script, mixed: Prepared, tmp_path: Path, in_process: list[str]
) -> None:
    words = ["--use_aspect_ratio_bucket", *flags(tmp_path / "robots", 5), "--checkpointing_steps", 3]
    whole = train(script, mixed, tmp_path / "whole", *words, "--max_train_steps", 8)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    words += ["--resume_from_checkpoint", "latest"]
    resumed = train(script, mixed, tmp_path / "cut", *words, "--max_train_steps", 8)
    assert same_lora(whole.folder / LORA_FILE, resumed.folder / LORA_FILE)
    assert losses(resumed) == losses(whole)[3:]


def test_a_shape_without_class_pictures_is_named(
    script: Script, mixed: Prepared, tmp_path: Path, in_process: list[str]
) -> None:
    save_pictures(tmp_path / "robots", [(64, 64)], seed=1)
    words = ["--use_aspect_ratio_bucket", *flags(tmp_path / "robots", 1)]
    said = train(script, mixed, tmp_path / "run", *words, code=2).error
    assert said.startswith("no class picture has the shape ")
    assert "of some of the subject's pictures, beside which only those of its shape are trained on: type" in said
    assert said.endswith("--num_class_images 3, and it is drawn")
    train(script, mixed, tmp_path / "run", "--use_aspect_ratio_bucket", *flags(tmp_path / "robots", 3))


def test_missing_pictures_are_shared_out_over_the_sizes() -> None:
    a, b, c = PictureSize(64, 64), PictureSize(48, 80), PictureSize(80, 48)
    assert shared_out(0, {a: 1}, {}) == {}
    assert shared_out(5, {a: 1}, {b: 3}) == {a: 5}
    assert shared_out(100, {a: 2, b: 2, c: 1}, {}) == {a: 40, b: 40, c: 20}
    assert shared_out(2, {a: 9, b: 1, c: 1}, {a: 1}) == {b: 1, c: 1}
    assert shared_out(10, {a: 1, b: 1}, {a: 8}) == {a: 1, b: 9}


# Several concepts


@pytest.fixture
def concepts(private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two concepts with classes of their own, one of whose folders is filled, embedded and cached; their list."""
    monkeypatch.chdir(tmp_path)
    save_pictures(Path("cat"), [(64, 64)] * 2, seed=2)
    save_pictures(Path("robots"), [(64, 64)] * 3, seed=1)
    robot = {"instance_prompt": PROMPT, "instance_data_dir": str(private.pictures), "class_data_dir": "robots"}
    cat = {"instance_prompt": "a photo of zwx cat", "instance_data_dir": "cat", "class_data_dir": "cats"}
    concepts = [{**robot, "class_prompt": CLASS_PROMPT}, {**cat, "class_prompt": "a photo of a cat"}]
    Path("concepts.json").write_text(json.dumps(concepts), encoding="utf-8")
    model = ["--pretrained_model_name_or_path", private.model, "--concepts_list", "concepts.json", "--device", "cpu"]
    text = ["--max_sequence_length", 20, "--output_path", private.embeddings]
    assert importlib.import_module("compute_embeddings").main([str(word) for word in [*model, *text]]) == 0
    latents = ["--output_path", private.latents]
    assert importlib.import_module("precompute_latents").main([str(word) for word in [*model, *latents]]) == 0
    return concepts


def of_concepts(private: Prepared) -> list[object]:
    words = ["--pretrained_model_name_or_path", private.model, "--concepts_list", "concepts.json", "--device", "cpu"]
    words += ["--data_df_path", private.embeddings, "--latents_path", private.latents, "--report_to", "none"]
    return [*words, "--seed", 0, "--with_prior_preservation", "--num_class_images", 2, "--output_dir", "out"]


def test_each_concept_has_its_class_pictures(
    script: Script,
    private: Prepared,
    concepts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    in_process: list[str],
) -> None:
    """Those that are there are encoded, the others drawn, so many of each; each comes with its class's prompt."""
    prompts: dict[str, str] = {}
    original = training_script().TrainingData.batch

    def batch(data: Any, indices: Any, draws: Any, taken: Any) -> Any:
        result = original(data, indices, draws, taken)
        prompts.update(zip(result.image_ids, taken, strict=True))
        return result

    monkeypatch.setattr(training_script().TrainingData, "batch", batch)
    result = script("train_dreambooth_sd3_lora_miniature", *of_concepts(private), "--max_train_steps", 8)
    assert result.code == 0, result.err
    assert in_process == ["precompute_latents", "draw_class_pictures"]
    assert "7 pictures and 4 class pictures at 64 px" in result.out
    robots, cats = ([hash_file(path) for path in sorted(Path(name).glob("*.png"))] for name in ("robots", "cats"))
    assert (len(robots), len(cats)) == (3, 2)
    assert {prompts[image_id] for image_id in cats} == {"a photo of a cat"}
    assert {prompts[image_id] for image_id in robots[:2]} == {CLASS_PROMPT}
    assert robots[2] not in prompts


def test_a_concept_without_a_class_is_named(
    script: Script, private: Prepared, concepts: list[dict[str, Any]], in_process: list[str]
) -> None:
    del concepts[1]["class_data_dir"], concepts[0]["class_prompt"]
    Path("concepts.json").write_text(json.dumps(concepts), encoding="utf-8")
    result = script("train_dreambooth_sd3_lora_miniature", *of_concepts(private))
    assert result.code == 2
    assert "concept 1 has no class_prompt, which --with_prior_preservation needs: add it" in result.err
    assert "concept 2 has no class_data_dir, which --with_prior_preservation needs: add it" in result.err
    concepts[0]["class_prompt"], concepts[1]["class_data_dir"] = CLASS_PROMPT, "robots"
    Path("concepts.json").write_text(json.dumps(concepts), encoding="utf-8")
    result = script("train_dreambooth_sd3_lora_miniature", *of_concepts(private))
    assert "concept 2 has the class_data_dir of another with another class_prompt: give it its own" in result.err
    assert (result.code, in_process) == (2, [])
