"""Each single change of what decides a run's numbers is caught when the stage that uses it starts, and no other is.

One run of one step is there. A row changes one thing, and only the start of a command that resumes it is carried out:
stage one's artefacts opened, and the run's identity compared. The rows of flags must be all the flags that there are.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import group_classes, groups_of
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.run_record import RunFacts, RunRecord
from sd3_lora.stage_one.config import EmbeddingConfig, LatentConfig
from sd3_lora.training.checkpoints import read_state
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.identifier_start import IdentifierStart
from sd3_lora.training.run_changes import require_same_run
from sd3_lora.training.run_identity import run_identity

import pytest
from accelerate import Accelerator
from conftest import PROMPT, TRAINING_SCRIPT, Prepared, save_pictures, save_tiny_sd3
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import private_copy, training_script

# Flags that decide the numbers: words of another value, and what the sentence then has.
IDENTIFIER = ["--train_identifier_embedding", "sks"]
DECIDE: dict[str, tuple[list[Any], str]] = {
    "instance_data_dir": (
        ["other"],
        "has no latents of 00.png (a new or changed picture): type `python precompute_latents.py",
    ),
    "instance_prompt": (["a photo of a cat"], "compute_embeddings.py"),
    "repeats": ([2], "give the repeats of then (--repeats 1)"),
    "resolution": ([48], "precompute_latents.py"),
    "center_crop": ([], "on other crops of"),
    "use_aspect_ratio_bucket": ([], "precompute_latents.py"),
    "num_augmented": ([1], "precompute_latents.py"),
    "data_df_path": (["none.parquet"], "compute_embeddings.py"),
    "max_sequence_length": ([10], "compute_embeddings.py"),
    "num_crops": ([1], "on other crops of"),
    "random_flip": ([], "precompute_latents.py"),
    "caption_dropout": ([0.5], "type --caption_dropout 0.0"),
    "clip_l_dropout": ([0.5], "type --clip_l_dropout 0.0"),
    "clip_g_dropout": ([0.5], "type --clip_g_dropout 0.0"),
    "t5_dropout": ([0.5], "type --t5_dropout 0.0"),
    "masked_loss": ([], "--mask_data_dir"),
    "unmasked_weight": ([0.5, "--masked_loss"], "--mask_data_dir"),
    "with_prior_preservation": (["--class_data_dir", "class", "--class_prompt", "a cat"], "compute_embeddings.py"),
    "prior_term": (["preference"], "leave --prior_term out"),
    "prior_term_weight": ([0.5, "--prior_term", "preference"], "leave --prior_term out"),
    "prior_share": ([0.5, "--prior_term", "prediction"], "leave --prior_term out"),
    "rank": ([2], "type --rank 4"),
    "lora_alpha": ([2], "type --lora_alpha 4"),
    "lora_dropout": ([0.5], "type --lora_dropout 0.0"),
    "lora_layers": (["attn.to_k"], "type --lora_layers attn.to_q"),
    "lora_blocks": ([1], "leave --lora_blocks out"),
    "rank_pattern": (["attn.to_q=2"], "leave --rank_pattern out"),
    "use_rslora": ([], "leave --use_rslora out"),
    "use_dora": ([], "leave --use_dora out"),
    "init_lora_weights": (["default"], "type --init_lora_weights gaussian"),
    "lora_type": (["lokr"], "type --lora_type lora"),
    "lokr_factor": ([2, "--lora_type", "lokr"], "type --lora_type lora, type --lokr_factor"),
    "init_lora": (["other"], "not other: type --init_lora "),
    "train_text_encoder": ([], "leave --train_text_encoder out"),
    "text_encoder_lr": ([1e-3, "--train_text_encoder"], "leave --text_encoder_lr out"),
    "text_encoder_rank": ([2, "--train_text_encoder"], "leave --text_encoder_rank out"),
    "stop_text_encoder_after": ([0.5, "--train_text_encoder"], "leave --stop_text_encoder_after out"),
    "adam_weight_decay_text_encoder": (
        [0.5, "--train_text_encoder"],
        "leave --adam_weight_decay_text_encoder out",
    ),
    "train_identifier_embedding": (["sks"], "leave --train_identifier_embedding out"),
    "train_text_encoder_ti": (["--instance_prompt", PROMPT], ""),
    "num_vectors": ([2, *IDENTIFIER], "leave --num_vectors out"),
    "initializer_word": (["dog", *IDENTIFIER], "leave --initializer_word out"),
    "identifier_lr": ([1e-3, *IDENTIFIER], "leave --identifier_lr out"),
    "stop_identifier_after": ([0.5, *IDENTIFIER], "leave --stop_identifier_after out"),
    "start_lora_after": ([0.5, *IDENTIFIER], "leave --start_lora_after out"),
    "optimizer": (["prodigy"], "type --optimizer AdamW"),
    "use_8bit_adam": ([], "leave --use_8bit_adam out"),
    "learning_rate": ([1e-3], "type --learning_rate 0.0001"),
    "lr_pattern": (["attn.to_q=1e-3"], "leave --lr_pattern out"),
    "scale_lr": ([], "leave --scale_lr out"),
    "lr_scheduler": (["linear"], "type --lr_scheduler constant"),
    "lr_warmup_steps": ([1], "type --lr_warmup_steps 0"),
    "lr_num_cycles": ([2], "type --lr_num_cycles 1"),
    "lr_power": ([2], "type --lr_power 1.0"),
    "lr_step_rules": (["1:1,0.5"], "leave --lr_step_rules out"),
    "adam_beta1": ([0.5], "type --adam_beta1 0.9"),
    "adam_beta2": ([0.5], "type --adam_beta2 0.999"),
    "adam_weight_decay": ([0.5], "type --adam_weight_decay 0.0001"),
    "adam_epsilon": ([1e-3], "type --adam_epsilon 1e-08"),
    "prodigy_beta3": ([0.5, "--optimizer", "prodigy"], "leave --prodigy_beta3 out"),
    "prodigy_decouple": (["no", "--optimizer", "prodigy"], "leave --prodigy_decouple out"),
    "prodigy_use_bias_correction": (
        ["no", "--optimizer", "prodigy"],
        "leave --prodigy_use_bias_correction out",
    ),
    "prodigy_safeguard_warmup": (["no", "--optimizer", "prodigy"], "leave --prodigy_safeguard_warmup out"),
    "max_grad_norm": ([2], "type --max_grad_norm 1.0"),
    "use_ema": ([], "leave --use_ema out"),
    "ema_decay": ([0.5, "--use_ema"], "leave --use_ema out"),
    "seed": ([1], "type --seed 0"),
    "train_batch_size": ([2], "type --train_batch_size 1"),
    "gradient_accumulation_steps": ([2], "type --gradient_accumulation_steps 1"),
    "mixed_precision": (["bf16"], "type --mixed_precision no"),
    "base_precision": (["nf4"], "type --base_precision 16bit"),
    "attention_kernel": (["math"], "type --attention_kernel auto"),
    "compile": (["on"], "type --compile off"),
    "weighting_scheme": (["mode"], "type --weighting_scheme logit_normal"),
    "logit_mean": ([1], "type --logit_mean 0.0"),
    "logit_std": ([2], "type --logit_std 1.0"),
    "mode_scale": ([1], "type --mode_scale 1.29"),
    "precondition_outputs": ([], "leave --precondition_outputs out"),
    "timestep_shift": ([1], "leave --timestep_shift out"),
    "pretrained_model_name_or_path": (["other_model"], "--overwrite`"),
}
DRAWS: list[Any] = ["--validation_prompt", PROMPT]
# Those that do not, with words that must not be refused.
DECIDE_NOTHING: dict[str, list[Any]] = {
    "recursive": [],
    "skip_broken": [],
    "output_dir": ["elsewhere"],
    "num_train_epochs": [4],
    "max_train_steps": [7],
    "checkpointing_steps": [3],
    "checkpoints_total_limit": [2],
    "export": ["kohya"],
    "report_to": ["none"],
    "logging_dir": ["logs2"],
    "validation_prompt": [PROMPT],
    "num_validation_images": [2, *DRAWS],
    "validation_steps": [2, *DRAWS],
    "validation_epochs": [2, *DRAWS],
    "validation_with_saves": [*DRAWS, "--save_every_n_steps", 1],
    "validation_negative_prompt": ["", *DRAWS],
    "validation_num_steps": [3, *DRAWS],
    "validation_guidance": [3, *DRAWS],
    "validation_seed": [5, *DRAWS],
    "save_every_n_steps": [2],
    "early_warning_steps": [2],
    "gradient_checkpointing": [],
    "recompute_blocks": [1],
    "offload_inputs": ["off"],
    "modulations_ahead": ["off"],
    "stream_text_encoders": ["off"],
    "capture": ["off"],
    "stream_blocks": [1],
    "stream_buffers": [2],
    "deterministic": ["on"],
    "vram_budget_gib": [4],
    "device": ["cpu"],
}
# Rows elsewhere: what they need is made there.
ELSEWHERE = {
    "concepts_list": "test_several_captions.py, test_prior_preservation.py",
    "repeats_from_folders": "test_several_captions.py",
    "dataset_name": "test_data_sets.py",
    "dataset_config_name": "test_data_sets.py",
    "image_column": "test_data_sets.py",
    "caption_column": "test_data_sets.py",
    "caption_prefix": "test_several_captions.py",
    "caption_suffix": "test_several_captions.py",
    "trigger_word": "test_several_captions.py",
    "latents_path": "test_artefacts.py",
    "use_filename_as_label": "test_several_captions.py",
    "use_txt_as_label": "test_several_captions.py",
    "shuffle_tags": "test_several_captions.py",
    "keep_tags": "test_several_captions.py",
    "bucket_step": "test_bucket_training.py",
    "bucket_min": "test_bucket_training.py",
    "bucket_max": "test_bucket_training.py",
    "bucket_no_upscale": "test_bucket_training.py",
    "rotation_degrees": "test_augmented_training.py, and below",
    "brightness_range": "test_augmented_training.py, and below",
    "mask_data_dir": "test_masked_loss.py",
    "alpha_mask": "test_masked_loss.py",
    "class_prompt": "test_prior_preservation.py",
    "class_captions": "test_class_captions.py",
    "class_data_dir": "test_prior_preservation.py",
    "class_prompts_file": "test_class_captions.py",
    "prior_loss_weight": "test_prior_preservation.py",
    "num_class_images": "test_prior_preservation.py",
    "prior_generation_precision": "test_prior_preservation.py",
    "sample_batch_size": "test_prior_preservation.py",
    "prior_prompts_file": "test_prior_term.py",
    "full": "test_full.py",
    "weight_rounding": "test_full.py",
    "allow_tf32": "of a GPU alone",
    "stream_from": "goes with what streams",
    "resume_from_checkpoint": "each row here has it",
    "validation_prompts_file": "as --validation_prompt",
    "revision": "test_model_files.py",
    "variant": "test_model_files.py",
    "cache_dir": "where a download lies",
    "plan": "trains nothing",
    "push_to_hub": "test_hub.py",
    "hub_model_id": "test_hub.py",
    "hub_token": "test_hub.py",
    "hub_private": "test_hub.py",
    "hub_checkpoints": "test_hub.py",
}
# The flags of stage one that training does not have: made anew with another value, an artefact is caught, or is not.
REMADE: dict[str, tuple[str, list[Any], str]] = {
    "t5_precision": ("compute_embeddings", ["fp16"], "with --t5_precision fp32, not fp16"),
    "vae_precision": ("precompute_latents", ["fp16"], "on latents made with --vae_precision fp32"),
    "alpha_background": ("precompute_latents", ["mean"], "on latents made with --alpha_background white"),
    "vae_batch_size": ("precompute_latents", [1], ""),
    "negative_prompt": ("compute_embeddings", ["blurry"], ""),
}
STAGE_ONE_ELSEWHERE = {
    "subject": "of prompts to be drawn",
    "prompts_file": "of prompts to be drawn",
    "t5_stream": "test_text_encoders.py: the same bits",
    "output_path": "where the artefact lies",
    "overwrite": "each row here has it",
    "vae_tile": "a note: test_latent_pipeline.py",
}


@dataclass(frozen=True)
class Job:
    """A run of one step in a folder of its own, and the words that made it."""

    folder: Path
    model: Path
    stage_one: Prepared

    @property
    def words(self) -> list[str]:
        """Of the command that resumes it."""
        shared = ["--device", "cpu", "--lora_layers", "attn.to_q", "--init_lora", self.folder / "start"]
        stage_one = replace(self.stage_one, model=self.model)
        words = [*stage_one.flags, *shared, "--output_dir", self.folder / "run", "--max_train_steps", 1]
        return [str(word) for word in words]

    def without(self, flag: str) -> list[str]:
        """The words without a flag and its value."""
        words = self.words
        if f"--{flag}" in words:
            at = words.index(f"--{flag}")
            del words[at : at + 2]
        return words


def refusal(words: list[str], checkpoint: Path) -> str:
    """What the start of the command says, as far as loading the transformer; empty where it goes on."""
    script = training_script()
    try:
        flags = TrainingFlags(*script.COMMAND_LINE.parse(words)).settled()
        files = ModelFiles(flags.model)
        request = script.stage_one_request(flags, files, files.resolution(flags.data.resolution))
        identifier = IdentifierStart.of(flags.identifier, files, None)
        prompts = script.validation_prompts(flags.watch)
        with ExitStack() as locks:
            data = script.open_data(request, prompts, Accelerator(cpu=True), flags.trains_clips, identifier, locks)
        precision = {"bf16": "bf16"}.get(flags.run.mixed_precision or "no", "fp32")
        plan = {"precision": "nf4" if flags.base.base_precision == "nf4" else None}
        seed = flags.run.seed or 0
        facts = RunFacts(
            files.name, None, {}, precision, 1, plan, resolution=request.resolution,
            max_sequence_length=data.text.size, seed=seed,
        )  # fmt: skip
        kernels = "blocks" if flags.step.compile == "on" else "off or graph"
        record = RunRecord(groups_of(flags), facts, run_identity(flags, facts, request, data, kernels))
        require_same_run(read_state(checkpoint)["signature"], record, checkpoint)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def ready(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run; tests must not write to it. It began with a LoRA, and lies in one folder with all that it needs."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(prepared.model, folder / "model")
    job = Job(folder, folder / "model", replace(private_copy(prepared, folder), model=folder / "model"))
    main = importlib.import_module(TRAINING_SCRIPT).main
    start = [*job.without("init_lora"), "--output_dir", str(folder / "start")]
    assert main(start) == 0
    assert main(job.words) == 0
    return job


@pytest.fixture
def job(ready: Job, tmp_path: Path) -> Job:
    """A copy of it in another folder, as someone who moved all of it has it."""
    folder = tmp_path / "moved"
    shutil.copytree(ready.folder, folder)
    names = ("pictures", "embeddings.parquet", "latents")
    return Job(folder, folder / "model", Prepared(folder / "model", *(folder / name for name in names)))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with other pictures, another model and another LoRA, which rows name."""
    folder = tmp_path_factory.mktemp("beside")
    save_pictures(folder / "other", [(64, 64)], seed=9)
    save_pictures(folder / "class", [(64, 64)], seed=8)
    save_tiny_sd3(folder / "other_model", seed=1, width=48)
    return folder


def test_no_flag_is_without_a_row() -> None:
    names = [f.name for group in group_classes(TrainingFlags) for f in fields(group)]
    rows = [*DECIDE, *DECIDE_NOTHING, *ELSEWHERE]
    assert sorted(rows) == sorted(names)
    of_stage_one = {f.name for group in (EmbeddingConfig, LatentConfig) for f in fields(group)} - set(names)
    assert {*REMADE, *STAGE_ONE_ELSEWHERE} == of_stage_one


@pytest.mark.parametrize("flag", [name for name in DECIDE if name != "train_text_encoder_ti"])
def test_a_flag_that_decides_the_numbers_is_caught(
    ready: Job, beside: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, says = DECIDE[flag]
    monkeypatch.chdir(beside)
    said = refusal([*ready.without(flag), f"--{flag}", *map(str, words)], ready.folder / "run" / "checkpoint-1")
    assert says in said, said


@pytest.mark.parametrize("flag", DECIDE_NOTHING)
def test_a_flag_that_decides_nothing_is_not_caught(ready: Job, flag: str) -> None:
    words = map(str, DECIDE_NOTHING[flag])
    said = refusal([*ready.without(flag), f"--{flag}", *words], ready.folder / "run" / "checkpoint-1")
    assert said == ""


def of_component(name: str) -> Callable[[Job], None]:
    """Changes one number of a component's weights."""

    def change(job: Job) -> None:
        (path,) = (job.model / name).glob("*.safetensors")
        tensors = load_file(path)
        first = next(iter(sorted(tensors)))
        tensors[first].view(-1)[0] += 1
        save_file(tensors, path, {"format": "pt"})

    return change


def of_json(name: str, key: str, value: Any) -> Callable[[Job], None]:
    """Changes one value of a JSON file of the model."""

    def change(job: Job) -> None:
        path = job.model / name
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content.get(key) != value
        path.write_text(json.dumps({**content, key: value}), encoding="utf-8")

    return change


def of_text(name: str) -> Callable[[Job], None]:
    """Adds a line break to a text of the model."""

    def change(job: Job) -> None:
        path = job.model / name
        path.write_bytes(path.read_bytes() + b"\n")

    return change


def another_pixel(job: Job) -> None:
    path = job.stage_one.pictures / "00.png"
    with Image.open(path) as picture:
        changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(path)


def a_caption(job: Job) -> None:
    (job.stage_one.pictures / "00.txt").write_text("a red robot", encoding="utf-8")


def one_more(job: Job) -> None:
    save_pictures(job.stage_one.pictures / "new", [(64, 64)], seed=5)[0].rename(job.stage_one.pictures / "99.png")


def one_less(job: Job) -> None:
    (job.stage_one.pictures / "00.png").unlink()


def another_start(job: Job) -> None:
    (path,) = (job.folder / "start").glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def remade(script: str, *words: object) -> Callable[[Job], None]:
    """Makes one of stage one's artefacts anew."""

    def change(job: Job) -> None:
        embeds = script == "compute_embeddings"
        output = job.stage_one.embeddings if embeds else job.stage_one.latents
        shared = ["--pretrained_model_name_or_path", job.model, "--instance_data_dir", job.stage_one.pictures]
        shared += ["--device", "cpu", "--overwrite", "--output_path", output]
        text = ["--instance_prompt", PROMPT, "--max_sequence_length", 20] if embeds else []
        assert importlib.import_module(script).main([str(word) for word in [*shared, *text, *words]]) == 0

    return change


def both(*changes: Callable[[Job], None]) -> Callable[[Job], None]:
    """One change after another."""

    def change(job: Job) -> None:
        for each in changes:
            each(job)

    return change


# One file of the job changed, and what the sentence then has.
FILES: dict[str, tuple[Callable[[Job], None], str]] = {
    "a picture's pixel": (
        another_pixel,
        "has no latents of 00.png (a new or changed picture): type `python precompute",
    ),
    "a caption": (a_caption, "type `python compute_embeddings.py"),
    "one picture more": (one_more, "has no latents of 99.png (a new or changed picture): type `python precompute_"),
    "one picture less": (one_less, "was trained also on 00.png: put back what was removed to go on"),
    "the VAE's weights": (of_component("vae"), "type `python precompute_latents.py"),
    "the VAE's scaling factor": (of_json("vae/config.json", "scaling_factor", 1.0), "type `python precompute_latents"),
    "the VAE's shift factor": (of_json("vae/config.json", "shift_factor", 1.0), "type `python precompute_latents.py"),
    "CLIP-L's weights": (of_component("text_encoder"), "type `python compute_embeddings.py"),
    "CLIP-G's weights": (of_component("text_encoder_2"), "type `python compute_embeddings.py"),
    "T5's weights": (of_component("text_encoder_3"), "type `python compute_embeddings.py"),
    "CLIP-L's configuration": (of_json("text_encoder/config.json", "hidden_act", "relu"), "`python compute_embeddings"),
    "CLIP-G's configuration": (of_json("text_encoder_2/config.json", "layer_norm_eps", 1), "`python compute_embeddin"),
    "T5's configuration": (of_json("text_encoder_3/config.json", "layer_norm_epsilon", 1), "`python compute_embeddin"),
    "CLIP-L's vocabulary": (of_text("tokenizer/tokenizer.json"), "type `python compute_embeddings.py"),
    "CLIP-G's vocabulary": (of_text("tokenizer_2/tokenizer.json"), "type `python compute_embeddings.py"),
    "T5's vocabulary": (of_text("tokenizer_3/tokenizer.json"), "type `python compute_embeddings.py"),
    "CLIP-G's padding": (of_json("tokenizer_2/tokenizer_config.json", "pad_token", "x"), "`python compute_embeddings"),
    "the scheduler's shift": (
        of_json("scheduler/scheduler_config.json", "shift", 1.0),
        "with other noise levels than the model's scheduler/scheduler_config.json has now: put back that file to go on",
    ),
    "the scheduler's levels": (
        of_json("scheduler/scheduler_config.json", "num_train_timesteps", 500),
        "with other noise levels than the model's scheduler/scheduler_config.json has now: put back that file to go on",
    ),
    "the transformer's weights": (of_component("transformer"), "on other weights of the transformer than this command"),
    "the transformer's configuration": (of_json("transformer/config.json", "x", 1), "on other weights of the transfor"),
    "the LoRA to begin with": (another_start, "was trained with --init_lora "),
    "another VAE, and its latents": (
        both(of_component("vae"), remade("precompute_latents")),
        "on latents of another VAE: give the model of then as --pretrained_model_name_or_path, and its latents as",
    ),
    "another T5, and its embeddings": (
        both(of_component("text_encoder_3"), remade("compute_embeddings")),
        "on embeddings of other text encoders: give the model of then as --pretrained_model_name_or_path, and its",
    ),
    **{name: (remade(script, f"--{name}", *words), says) for name, (script, words, says) in REMADE.items()},
}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_caught(job: Job, name: str) -> None:
    change, says = FILES[name]
    change(job)
    said = refusal(job.words, job.folder / "run" / "checkpoint-1")
    assert says in said, said
    assert bool(said) == bool(says), said


def touched(job: Job) -> None:
    for path in job.folder.rglob("*"):
        os.utime(path, (1, 1))


def in_another_folder(job: Job) -> None:
    """Nothing: the job is a copy in another folder than that of its run."""


def in_shards(job: Job) -> None:
    """The same weights in other files, in another order."""
    for name, kind in (("transformer", SD3Transformer2DModel), ("vae", AutoencoderKL)):
        model = kind.from_pretrained(job.model / name)
        shutil.rmtree(job.model / name)
        model.save_pretrained(job.model / name, max_shard_size="20KB")
        assert len(list((job.model / name).glob("*.safetensors"))) > 1


def in_other_words(job: Job) -> None:
    """The same configurations with other line breaks and in another order."""
    for path in job.model.glob("*/*config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(dict(reversed(content.items())), indent=7), encoding="utf-8")


def other_names(job: Job) -> None:
    for path in sorted(job.stage_one.pictures.glob("*.png")):
        path.rename(path.with_name(f"dog{path.name}"))


def without_the_start(job: Job) -> None:
    shutil.rmtree(job.folder / "start")


UNCHANGED = [in_another_folder, touched, in_shards, in_other_words, other_names, without_the_start]
UNCHANGED += [remade("precompute_latents"), remade("compute_embeddings")]


@pytest.mark.parametrize("change", UNCHANGED, ids=lambda change: change.__qualname__)
def test_what_has_not_changed_is_not_caught(ready: Job, job: Job, change: Callable[[Job], None]) -> None:
    change(job)
    words = (
        [*job.without("init_lora"), "--init_lora", str(ready.folder / "start")] if change is without_the_start else []
    )
    said = refusal(words or job.words, job.folder / "run" / "checkpoint-1")
    assert said == ""


def test_a_renamed_folder_and_relative_paths_are_not_caught(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.stage_one.pictures.rename(job.folder / "photos")
    words = [word.replace(f"{job.folder}{os.sep}", "").replace("pictures", "photos") for word in job.words]
    assert not any(os.path.isabs(word) for word in words)
    monkeypatch.chdir(job.folder)
    assert refusal(words, Path("run/checkpoint-1")) == ""


def test_a_checkpoint_of_an_earlier_build_is_not_caught(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not note what made stage one's artefacts, nor the noise levels."""
    later = ("the text encoders", "the VAE", "--vae_precision", "--alpha_background", "the noise levels")
    later += ("the LoRA to begin with", "the cached --rotation_degrees", "the cached --brightness_range")
    state = read_state(job.folder / "run" / "checkpoint-1")
    kept = {name: value for name, value in state["signature"].items() if name not in later}
    assert len(kept) == len(state["signature"]) - len(later)
    monkeypatch.setattr(f"{__name__}.read_state", lambda _: {"signature": kept})
    words = [*job.without("init_lora"), "--init_lora", str(job.folder.parent.parent / "x")]
    assert "with --init_lora" in refusal(words, job.folder / "run" / "checkpoint-1")
    of_json("scheduler/scheduler_config.json", "shift", 1.0)(job)
    words = [*job.without("init_lora"), "--init_lora", kept["--init_lora"]]
    assert refusal(words, job.folder / "run" / "checkpoint-1") == ""
