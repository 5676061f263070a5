"""Every flag of training has an effect, and the flags that are refused say what to do instead."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sd3_lora.common.config import ModelConfig, group_classes
from sd3_lora.stage_one.config import LatentConfig
from sd3_lora.training.config import HARMLESS_FLAGS, REFUSED_FLAGS, TrainingFlags
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.training.run_flags import DEFAULT_STEPS, RunConfig
from sd3_lora.transformer import recompute
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from training_runs import Run, Script, private_copy, same_lora, train

GROUPS = group_classes(TrainingFlags)

# Flags that change the numbers: their words, and what must then differ from a run without. `losses` are those after
# the first step too; `lora` alone where the losses cannot show it within a few steps.
NUMBERS: list[tuple[str, list[Any], str]] = [
    ("instance_prompt", ["a photo of a robot"], "losses"),
    ("rank", [8], "lora"),
    ("lora_alpha", [8], "lora"),
    ("lora_dropout", [0.5], "lora"),
    ("lora_layers", ["attn.to_k"], "lora"),
    ("lora_blocks", [0], "lora"),
    ("lora_layers", ["attention+mlp"], "lora"),
    ("lora_blocks", ["late"], "lora"),
    ("rank_pattern", ["attn.to_k=2"], "lora"),
    ("use_rslora", [], "lora"),
    ("use_dora", [], "lora"),
    ("init_lora_weights", ["default"], "lora"),
    ("init_lora_weights", ["pissa"], "lora"),
    ("init_lora_weights", ["olora"], "lora"),
    ("lora_type", ["lokr"], "lora"),
    ("lora_type", ["loha"], "lora"),
    ("lokr_factor", [2, "--lora_type", "lokr"], "lora"),
    ("use_8bit_adam", ["--rank", 128], "lora"),
    ("learning_rate", [1e-3], "lora"),
    ("scale_lr", [], "lora"),
    ("adam_beta1", [0.5], "lora"),
    ("adam_beta2", [0.9], "lora"),
    ("adam_weight_decay", [100.0], "lora"),
    ("adam_epsilon", [1e-2], "lora"),
    ("max_grad_norm", [1e-7], "lora"),
    ("seed", [1], "losses"),
    ("train_batch_size", [2], "losses"),
    ("gradient_accumulation_steps", [2], "losses"),
    ("mixed_precision", ["bf16"], "losses"),
    ("base_precision", ["nf4"], "losses"),
    ("weighting_scheme", ["sigma_sqrt"], "losses"),
    ("weighting_scheme", ["mode"], "losses"),
    ("weighting_scheme", ["cosmap"], "losses"),
    ("weighting_scheme", ["none"], "losses"),
    ("logit_mean", [1.0], "losses"),
    ("logit_std", [0.5], "losses"),
    ("precondition_outputs", [], "losses"),
    ("timestep_shift", [1.0], "losses"),
    ("caption_dropout", [1.0], "losses"),
    ("clip_l_dropout", [1.0], "losses"),
    ("clip_g_dropout", [1.0], "losses"),
    ("t5_dropout", [1.0], "losses"),
    ("prior_term", ["preference"], "losses"),
]

# Flags with a test of their own, here or where it says.
ELSEWHERE = {
    "instance_data_dir": "here",
    "data_df_path": "here",
    "latents_path": "here",
    "recursive": "here",
    "concepts_list": "test_several_captions.py",
    "repeats": "test_several_captions.py",
    "repeats_from_folders": "test_several_captions.py",
    "dataset_name": "test_data_sets.py",
    "dataset_config_name": "test_data_sets.py",
    "image_column": "test_data_sets.py",
    "caption_column": "test_data_sets.py",
    "caption_prefix": "test_several_captions.py",
    "caption_suffix": "test_several_captions.py",
    "trigger_word": "test_several_captions.py",
    "use_filename_as_label": "test_several_captions.py",
    "use_txt_as_label": "test_several_captions.py",
    "shuffle_tags": "test_several_captions.py",
    "keep_tags": "test_several_captions.py",
    "compile": "test_step_execution.py",
    "capture": "test_step_execution.py",
    "deterministic": "test_step_execution.py, test_exact_attention.py",
    "recompute_blocks": "test_forced_flags.py",
    "offload_inputs": "test_forced_flags.py",
    "modulations_ahead": "test_forced_flags.py",
    "stream_text_encoders": "test_text_encoder_lora.py",
    "stream_blocks": "test_forced_flags.py",
    "stream_from": "test_forced_flags.py",
    "stream_buffers": "test_forced_flags.py",
    "attention_kernel": "test_forced_flags.py",
    "skip_broken": "test_stage_one.py",
    "center_crop": "here",
    "num_crops": "here",
    "random_flip": "here",
    "num_augmented": "test_augmented_training.py",
    "rotation_degrees": "test_augmented_training.py, test_augmentation.py",
    "brightness_range": "test_augmented_training.py, test_augmentation.py",
    "masked_loss": "test_masked_loss.py",
    "unmasked_weight": "test_masked_loss.py",
    "mask_data_dir": "test_masked_loss.py, test_masks.py",
    "alpha_mask": "test_masked_loss.py, test_masks.py",
    "use_aspect_ratio_bucket": "test_bucket_training.py",
    "bucket_step": "test_bucket_training.py, test_buckets.py",
    "bucket_min": "test_buckets.py",
    "bucket_max": "test_buckets.py",
    "bucket_no_upscale": "test_buckets.py",
    "max_sequence_length": "test_train.py",
    "resolution": "test_train.py",
    "optimizer": "test_optimizers_by_name.py",
    "lr_pattern": "test_trainables.py",
    "prodigy_beta3": "test_optimizers_by_name.py",
    "prodigy_decouple": "test_optimizers_by_name.py",
    "prodigy_use_bias_correction": "test_optimizers_by_name.py",
    "prodigy_safeguard_warmup": "test_optimizers_by_name.py",
    "train_text_encoder": "test_text_encoder_lora.py",
    "text_encoder_lr": "test_text_encoder_lora.py",
    "text_encoder_rank": "test_text_encoder_lora.py",
    "stop_text_encoder_after": "test_text_encoder_lora.py",
    "adam_weight_decay_text_encoder": "test_text_encoder_lora.py",
    "full": "test_full.py",
    "weight_rounding": "test_full.py",
    "train_identifier_embedding": "test_identifier_embedding.py",
    "train_text_encoder_ti": "test_identifier_embedding.py",
    "num_vectors": "test_identifier_embedding.py",
    "initializer_word": "test_identifier_embedding.py",
    "identifier_lr": "test_identifier_embedding.py",
    "stop_identifier_after": "test_identifier_embedding.py",
    "start_lora_after": "test_identifier_embedding.py",
    "use_ema": "test_ema.py",
    "init_lora": "test_kinds.py",
    "ema_decay": "test_ema.py",
    "lr_scheduler": "here",
    "lr_warmup_steps": "here",
    "lr_num_cycles": "here",
    "lr_power": "here",
    "lr_step_rules": "here",
    "mode_scale": "here",
    "prior_term_weight": "test_prior_term.py",
    "prior_share": "test_prior_term.py",
    "prior_prompts_file": "test_prior_term.py",
    "num_train_epochs": "here",
    "max_train_steps": "here",
    "gradient_checkpointing": "here",
    "allow_tf32": "here",
    "device": "here",
    "with_prior_preservation": "test_prior_preservation.py",
    "class_prompt": "test_prior_preservation.py",
    "class_data_dir": "test_prior_preservation.py",
    "class_captions": "test_class_captions.py",
    "class_prompts_file": "test_class_captions.py",
    "num_class_images": "test_prior_preservation.py",
    "prior_loss_weight": "test_prior_preservation.py",
    "prior_generation_precision": "test_prior_preservation.py",
    "sample_batch_size": "test_prior_preservation.py",
    "output_dir": "here",
    "pretrained_model_name_or_path": "test_train.py",
    "revision": "test_model_files.py",
    "variant": "here",
    "cache_dir": "here",
    "checkpointing_steps": "test_resume.py",
    "checkpoints_total_limit": "test_resume.py",
    "resume_from_checkpoint": "test_resume.py",
    "vram_budget_gib": "test_memory_plan.py",
    "plan": "test_memory_plan.py",
    "export": "test_export.py",
    "validation_prompt": "test_validation.py",
    "validation_prompts_file": "test_validation.py",
    "num_validation_images": "test_validation.py",
    "validation_steps": "test_validation.py",
    "validation_epochs": "test_validation.py",
    "validation_with_saves": "test_validation.py",
    "validation_negative_prompt": "test_validation.py",
    "validation_num_steps": "test_validation.py",
    "validation_guidance": "test_validation.py",
    "validation_seed": "test_validation.py",
    "save_every_n_steps": "test_validation.py",
    "early_warning_steps": "test_early_warning.py",
    "report_to": "test_trackers.py",
    "logging_dir": "test_trackers.py",
    "push_to_hub": "test_hub.py",
    "hub_model_id": "test_hub.py",
    "hub_token": "test_hub.py",
    "hub_private": "test_hub.py",
    "hub_checkpoints": "test_hub.py",
}


def test_no_flag_is_without_a_test() -> None:
    names = [f.name for group in GROUPS for f in fields(group)]
    assert len(names) == len(set(names))
    assert {name for name, _, _ in NUMBERS} | set(ELSEWHERE) == set(names)
    assert not {name for name, _, _ in NUMBERS} & set(ELSEWHERE)
    assert not set(names) & {*REFUSED_FLAGS, *HARMLESS_FLAGS}


@dataclass(frozen=True)
class Base:
    """A short run without the flag."""

    stage_one: Prepared
    run: Run
    wide: Run


@pytest.fixture(scope="module")
def base(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Two steps, of rank 4 and, where 8 bits are to show, 128."""
    folder = tmp_path_factory.mktemp("base")
    script = importlib.import_module(TRAINING_SCRIPT)
    shared = [*prepared.flags, "--device", "cpu", "--max_train_steps", 2]
    for name, words in (("plain", []), ("wide", ["--rank", 128])):
        assert script.main([str(word) for word in [*shared, "--output_dir", folder / name, *words]]) == 0
    return Base(prepared, Run(folder / "plain", "", ""), Run(folder / "wide", "", ""))


def same_tensors(left: Run, right: Run) -> bool:
    mine, theirs = left.lora, right.lora
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("flag", "words", "shows"), NUMBERS, ids=[" ".join(map(str, (f, *w))) for f, w, _ in NUMBERS])
def test_a_flag_changes_the_numbers(
    script: Script, base: Base, tmp_path: Path, flag: str, words: list[Any], shows: str
) -> None:
    words = [f"--{flag}", *words, "--max_train_steps", 2]
    if flag == "scale_lr":
        words += ["--train_batch_size", 1, "--gradient_accumulation_steps", 2]
    without = base.wide if "--rank" in words else base.run
    run = train(script, base.stage_one, tmp_path / "with", *words)
    if flag == "scale_lr":
        assert [line["learning_rate"] for line in run.losses] == [2e-4, 2e-4]
        words.remove("--scale_lr")
        without = train(script, base.stage_one, tmp_path / "without", *words)
    losses, others = ([line["loss"] for line in each.losses] for each in (run, without))
    if shows == "losses":
        assert all(mine != theirs for mine, theirs in zip(losses, others, strict=True))
    else:
        close = pytest.approx(others[0], rel=1e-5) if flag == "init_lora_weights" else others[0]  # it cancels out
        assert losses[0] == close or flag == "rank"
        assert not same_tensors(run, without)
    # Twice the same is the same: the difference is the flag's.
    again = train(script, base.stage_one, tmp_path / "again", *words, *(["--scale_lr"] if flag == "scale_lr" else []))
    assert same_tensors(run, again)
    assert again.losses == run.losses


def test_mode_scale(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--weighting_scheme", "mode", "--mode_scale"]
    runs = [train(script, prepared, tmp_path / str(scale), *words, scale) for scale in (0.5, 1.29)]
    default = train(script, prepared, tmp_path / "default", *words[:2])
    assert runs[0].losses != runs[1].losses == default.losses


# The learning rate

SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("constant", {}),
    ("constant_with_warmup", {"lr_warmup_steps": 3}),
    ("linear", {}),
    ("linear", {"lr_warmup_steps": 2}),
    ("cosine", {}),
    ("cosine", {"lr_warmup_steps": 3}),
    ("cosine_with_restarts", {"lr_num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_power": 2.0, "lr_warmup_steps": 1}),
    ("piecewise_constant", {"lr_step_rules": "1:2,0.5:5,0.1"}),
]
# The names of get_scheduler's own arguments.
ARGUMENTS = {
    "lr_warmup_steps": "num_warmup_steps",
    "lr_num_cycles": "num_cycles",
    "lr_power": "power",
    "lr_step_rules": "step_rules",
}


def expected_rates(name: str, options: dict[str, Any], steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    arguments = {"num_warmup_steps": 0, **{ARGUMENTS[key]: value for key, value in options.items()}}
    schedule = get_scheduler(name, optimizer, num_training_steps=steps, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("name", "options"), SCHEDULES, ids=lambda value: str(value))
def test_the_schedules_are_diffusers(
    script: Script, prepared: Prepared, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    words = ["--lr_scheduler", name, "--learning_rate", 2e-3, "--max_train_steps", 8]
    words += [word for key, value in options.items() for word in (f"--{key}", value)]
    run = train(script, prepared, tmp_path, *words, "--lora_blocks", 0, "--lora_layers", "attn.to_k")
    rates = [line["learning_rate"] for line in run.losses]
    assert rates == pytest.approx(expected_rates(name, options, 8, 2e-3), rel=1e-12)
    assert len(set(rates)) == (1 if name == "constant" else len(set(expected_rates(name, options, 8, 1.0))))


def test_the_default_is_constant() -> None:
    assert OptimizerConfig().lr_scheduler == "constant"
    assert OptimizerConfig().lr_warmup_steps == 0  # diffusers' 500 would warm up for the whole of a short run


def test_the_choices_are_diffusers() -> None:
    from diffusers.optimization import SchedulerType

    (choices,) = (f.type for f in fields(OptimizerConfig) if f.name == "lr_scheduler")
    assert set(re.findall(r'"(\w+)"', str(choices)) or re.findall(r"'(\w+)'", str(choices))) == {
        kind.value for kind in SchedulerType
    }


BAD_VALUES: list[tuple[list[Any], str]] = [
    (["--lr_scheduler", "piecewise_constant"], "piecewise_constant needs --lr_step_rules, for example 1:100,0.1"),
    (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "half"], "--lr_step_rules half cannot be read: type"),
    (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:100"], "--lr_step_rules 1:100 cannot be read"),
    (["--lr_scheduler", "polynomial", "--learning_rate", 1e-8], "--lr_scheduler polynomial: "),
    (["--lr_scheduler", "exponential"], "argument --lr_scheduler: invalid choice: 'exponential'"),
    (["--weighting_scheme", "gauss"], "argument --weighting_scheme: invalid choice: 'gauss'"),
    (["--mixed_precision", "fp8"], "argument --mixed_precision: invalid choice: 'fp8'"),
    (["--learning_rate", 0], "--learning_rate and --max_grad_norm must be positive"),
    (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
    (["--lr_pattern", "attn"], "--lr_pattern attn cannot be read: type for example attn=5e-5"),
    (["--lr_pattern", "attn=0"], "--lr_pattern attn=0 cannot be read"),
    (["--lr_pattern", "attn=fast"], "--lr_pattern attn=fast cannot be read"),
    (["--lr_pattern", "=1e-3"], "--lr_pattern =1e-3 cannot be read"),
    (["--lr_pattern", "attn=1e-3,conv=1e-3"], "--lr_pattern conv=0.001: what is trained is attn.add_k_proj.lora_A, "),
    (["--lr_pattern", "attn=1e-3,to_q=1e-4"], "--lr_pattern to_q=0.0001: patterns before it have all that it fits"),
    (
        ["--lr_pattern", "attn=1e-3", "--optimizer", "prodigy"],
        "--lr_pattern attn=1e-3 does not go with --optimizer prodigy, which finds one learning rate for all",
    ),
    (["--max_grad_norm", 0], "--learning_rate and --max_grad_norm must be positive"),
    (["--lr_warmup_steps", -1], "--lr_warmup_steps not negative"),
    (["--adam_beta1", 1.0], "--adam_beta1 and --adam_beta2 must be at least 0 and less than 1"),
    (["--adam_beta2", -0.1], "--adam_beta1 and --adam_beta2 must be at least 0 and less than 1"),
    (["--adam_weight_decay", -1], "--adam_weight_decay and --adam_epsilon must not be negative"),
    (["--adam_epsilon", -0.1], "--adam_weight_decay and --adam_epsilon must not be negative"),
    (["--rank", 0], "--rank 0 must be at least 1"),
    (["--rank", 2.5], "argument --rank: invalid int value: '2.5'"),
    (["--lora_alpha", 0], "--lora_alpha must be positive"),
    (["--lora_dropout", 1], "--lora_dropout must be at least 0 and less than 1"),
    (["--lora_blocks", "1-3"], "--lora_blocks 1-3 is not a list of numbers: type for example 12,13"),
    (["--num_crops", 0], "--num_crops 0 must be at least 1"),
    (["--repeats", 0], "--repeats 0 must be at least 1"),
    (["--caption_dropout", 1.5], "--caption_dropout must be at least 0 and at most 1"),
    (["--t5_dropout", -0.5], "--t5_dropout must be at least 0 and at most 1"),
    (["--shuffle_tags", -1], "--shuffle_tags and --keep_tags must not be negative"),
    (["--keep_tags", 1], "--keep_tags needs --shuffle_tags"),
    (["--use_filename_as_label", "--use_txt_as_label"], "exclude each other: type one of them"),
    (["--dataset_name", "d"], "--instance_data_dir and --dataset_name exclude each other: type one of them"),
    (["--image_column", "image"], "--image_column needs --dataset_name"),
    (["--train_batch_size", 0], "--train_batch_size 0 must be at least 1"),
    (["--gradient_accumulation_steps", 0], "--gradient_accumulation_steps 0 must be at least 1"),
    (["--max_train_steps", 0], "--max_train_steps 0 must be at least 1"),
    (["--num_train_epochs", 0], "--num_train_epochs 0 must be at least 1"),
    (["--checkpointing_steps", 0], "--checkpointing_steps 0 must be at least 1"),
    (["--checkpoints_total_limit", 0], "--checkpoints_total_limit 0 must be at least 1"),
    (["--export", "comfyui"], "--export comfyui is unknown: type kohya or a1111"),
    (["--logit_std", -1], "--logit_std must not be negative"),
    (["--prior_term", "dreambooth"], "argument --prior_term: invalid choice: 'dreambooth'"),
    (["--prior_term", "prediction", "--prior_term_weight", 0], "--prior_term_weight 0 must be positive: leave --prior"),
    (["--prior_term", "preference", "--prior_term_weight", "inf"], "--prior_term_weight inf must be positive: leave "),
    (["--prior_term_weight", 2], "--prior_term_weight has no effect without --prior_term: add that, or leave --prior_"),
    (
        ["--prior_share", 0.5],
        "--prior_share has no effect without --prior_term prediction: add that, or leave --prior_",
    ),
    (["--prior_term", "preference", "--prior_share", 1], "--prior_share has no effect without --prior_term prediction"),
    (
        ["--prior_term", "preference", "--prior_prompts_file", "f"],
        "--prior_prompts_file has no effect without --prior_",
    ),
    (
        ["--prior_term", "prediction", "--prior_share", 0],
        "--prior_share 0 must be more than 0 and at most 1: 0.25 is a",
    ),
    (["--prior_term", "prediction", "--prior_share", 1.5], "--prior_share 1.5 must be more than 0 and at most 1"),
    (["--prior_term", "prediction", "--class_data_dir", "d"], "--class_data_dir has no effect without --with_prior_pr"),
    (
        ["--class_prompt", "a"],
        "without --with_prior_preservation or --prior_term prediction: add one of them, or leave",
    ),
    (
        ["--prior_term", "prediction", "--with_prior_preservation", "--class_prompt", "a", "--class_data_dir", "d"],
        "--with_prior_preservation and --prior_term are two ways of prior preservation, with and without class pictu",
    ),
    (["--timestep_shift", 0], "--timestep_shift must be positive: 3.0 is SD3's own"),
]


@pytest.mark.parametrize(("words", "says"), BAD_VALUES, ids=[" ".join(map(str, words)) for words, _ in BAD_VALUES])
def test_a_bad_value_is_a_sentence(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str
) -> None:
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert says in run.error
    assert run.wrote_no_weights()


def test_what_is_always_so_changes_nothing(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--cache_latents", "--upcast_before_saving", "--dataloader-num-workers=4", "--local_rank", -1]
    run = train(script, prepared, tmp_path / "with", *words)
    assert [line for line in run.out.splitlines() if line.startswith("note: --")] == [
        f"note: --{name} changes nothing: {HARMLESS_FLAGS[name].note}"
        for name in ("cache_latents", "upcast_before_saving", "dataloader_num_workers", "local_rank")
    ]
    plain = train(script, prepared, tmp_path / "without")
    assert same_lora(run.folder / LORA_FILE, plain.folder / LORA_FILE)
    with_flags, without = (json.loads((each.folder / "run.json").read_text()) for each in (run, plain))
    assert with_flags["identity"] == without["identity"]
    assert set(with_flags["flags"]) == set(without["flags"])


# In train_dreambooth_lora_sd3.py and the sd3_lora_colab script of diffusers (58eb52c), where ours is another.
DIFFUSERS_DEFAULTS = {
    "resolution": "512",
    "max_sequence_length": "77",
    "num_crops": None,
    "train_batch_size": "4",
    "num_train_epochs": "1",
    "max_train_steps": "one epoch",
    "lr_warmup_steps": "500",
    "mixed_precision": "no",
    "precondition_outputs": "on",
}


def test_the_help_says_where_diffusers_default_is_another() -> None:
    flags = {f.name: f for group in (*GROUPS, LatentConfig) for f in fields(group)}
    for name, default in DIFFUSERS_DEFAULTS.items():
        assert f"(diffusers: {default or 'one, from a random place'}" in flags[name].metadata["help"], name
        assert str(flags[name].default) != default


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [],
            "batch 1 × accumulation 1 × processes 1, 1 step, learning rate 0.0001 constant, weighting logit_normal, ",
        ),
        (["--train_batch_size", 2, "--gradient_accumulation_steps", 3], "px, batch 2 × accumulation 3 × processes 1, "),
        (["--train_batch_size", 2, "--scale_lr", "--learning_rate", 2e-3], "learning rate 0.004 constant, "),
        (
            ["--train_batch_size", 2, "--scale_lr", "--lr_pattern", "to_q=1e-3, lora_B=2e-3"],
            "learning rate 0.0002 (to_q 0.002, lora_B 0.004) constant, ",
        ),
        (["--lr_warmup_steps", 1], "0.0001 constant, weighting"),  # a schedule without a warmup
        (["--lr_warmup_steps", 1, "--lr_scheduler", "cosine"], "0.0001 cosine after 1 step of warmup, weighting"),
        (["--weighting_scheme", "mode", "--precondition_outputs", 1], "weighting mode, precondition_outputs on"),
        (["--precondition_outputs", 0], "precondition_outputs off"),
    ],
)
def test_what_is_in_force_is_said(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str
) -> None:
    run = train(script, prepared, tmp_path, *words, "--max_train_steps", 1)
    (line,) = [line for line in run.out.splitlines() if line.startswith("in force: ")]
    assert line.startswith("in force: 64 px, batch ")
    assert says in line


# One by one


def test_instance_data_dir(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    for name in ("00.png", "03.png"):
        (tmp_path / "two").mkdir(exist_ok=True)
        shutil.copy(prepared.pictures / name, tmp_path / "two" / name)
    run = train(script, prepared, tmp_path / "out", "--instance_data_dir", tmp_path / "two")
    assert "2 pictures at 64 px" in run.out
    alias = train(script, prepared, tmp_path / "alias", "--local_data_dir", tmp_path / "two")
    assert alias.losses == run.losses


def test_recursive(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    private = private_copy(prepared, tmp_path / "stage_one")
    below = private.pictures / "below"
    below.mkdir()
    for name in ("03.png", "04.png"):
        (private.pictures / name).rename(below / name)
    assert "3 pictures at 64 px" in train(script, private, tmp_path / "flat").out
    assert "5 pictures at 64 px" in train(script, private, tmp_path / "deep", "--recursive").out


@pytest.mark.parametrize("flag", ["data_df_path", "latents_path"])
def test_where_stage_one_is_read(script: Script, prepared: Prepared, tmp_path: Path, flag: str) -> None:
    private = private_copy(prepared, tmp_path / "stage_one")
    path = private.embeddings if flag == "data_df_path" else private.latents
    moved = path.rename(tmp_path / "moved")
    run = train(script, private, tmp_path / "out", f"--{flag}", moved)
    assert run.losses == train(script, prepared, tmp_path / "plain").losses


def test_crops(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Ten draws: by chance they are all central once in 6,561 times."""
    words = ["--train_batch_size", 5, "--max_train_steps", 2]
    default = train(script, prepared, tmp_path / "default", *words)
    three = train(script, prepared, tmp_path / "three", *words, "--num_crops", 3)
    one = train(script, prepared, tmp_path / "one", *words, "--num_crops", 1)
    center = train(script, prepared, tmp_path / "center", *words, "--center_crop")
    assert default.losses == three.losses != one.losses == center.losses


def test_random_flip(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", prepared.model, "--instance_data_dir", prepared.pictures]
    words += ["--random_flip", "--device", "cpu", "--output_path", tmp_path / "flipped"]
    assert script("precompute_latents", *words).code == 0
    words = ["--latents_path", tmp_path / "flipped", "--max_train_steps", 4]
    default = train(script, prepared, tmp_path / "default", *words)
    with_twins = train(script, prepared, tmp_path / "with", *words, "--random_flip")
    without = train(script, prepared, tmp_path / "without", *words, "--random_flip", "no")
    assert default.losses == with_twins.losses != without.losses
    plain = train(script, prepared, tmp_path / "plain", "--max_train_steps", 4)
    assert [line["loss"] for line in without.losses] == pytest.approx([line["loss"] for line in plain.losses], rel=1e-5)


def test_output_dir_is_made(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "some" / "folder")
    assert (tmp_path / "some" / "folder" / LORA_FILE).is_file()
    assert f"wrote {tmp_path / 'some' / 'folder' / LORA_FILE}" in run.out


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--num_train_epochs", 2], 10),
        (["--num_train_epochs", 2, "--train_batch_size", 2], 5),
        (["--num_train_epochs", 1, "--gradient_accumulation_steps", 2], 3),
        (["--num_train_epochs", 1, "--train_batch_size", 2, "--gradient_accumulation_steps", 4], 1),
        (["--num_train_epochs", 3, "--max_train_steps", 2], 2),
        (["--max_train_steps", 4], 4),
    ],
)
def test_how_long(script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], steps: int) -> None:
    """As many whole windows as the epochs take; --max_train_steps wins."""
    shared = [*prepared.flags, "--device", "cpu", "--lora_layers", "attn.to_k", "--output_dir", tmp_path]
    assert script(TRAINING_SCRIPT, *shared, *words).code == 0
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == steps


def test_how_long_by_default() -> None:
    assert RunConfig().steps(pictures=5, processes=1) == DEFAULT_STEPS == 500
    assert RunConfig(num_train_epochs=7, train_batch_size=2).steps(pictures=5, processes=2) == 9


def test_gradient_checkpointing(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, with dropout too; and each block is really recomputed."""
    calls: list[str] = []
    original = recompute.checkpoint

    def checkpoint(function: Callable[..., Any], *words: Any, **more: Any) -> Any:
        calls.append(type(function).__name__)
        return original(function, *words, **more)

    monkeypatch.setattr(recompute, "checkpoint", checkpoint)
    words = ["--lora_dropout", 0.2, "--learning_rate", 0.01]
    plain = train(script, prepared, tmp_path / "plain", *words)
    assert calls == []
    recomputed = train(script, prepared, tmp_path / "recomputed", *words, "--gradient_checkpointing")
    assert len(calls) == 3 * 2  # steps times blocks
    assert recomputed.losses == plain.losses
    assert same_lora(plain.folder / LORA_FILE, recomputed.folder / LORA_FILE)


def test_allow_tf32(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        train(script, prepared, tmp_path / "without", "--max_train_steps", 1)
        assert torch.backends.cuda.matmul.allow_tf32 is False
        train(script, prepared, tmp_path / "with", "--max_train_steps", 1, "--allow_tf32")
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_device(script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sd3_lora.common.devices.has_nvidia_gpu", lambda: False)
    run = train(script, prepared, tmp_path, "--device", "cuda", code=2)
    assert run.error == "torch finds no GPU here: check `nvidia-smi`, or type --device cpu"


def test_variant(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "out", "--variant", "fp16", code=2)
    assert "--variant" in run.error
    model = tmp_path / "model"
    shutil.copytree(prepared.model, model)
    for folder in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        (weights,) = (model / folder).glob("*.safetensors")
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    words = ["--pretrained_model_name_or_path", model, "--variant", "fp16", "--max_train_steps", 1]
    train(script, prepared, tmp_path / "same", *words)  # the same tensors under another name
    path = model / "text_encoder" / "model.fp16.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert "other weights than" in run.error or "was made with model" in run.error  # found, and hashed under this name
    script_of_stage_one = run.error.split("`")[1]
    assert " --variant fp16 " in script_of_stage_one


def test_cache_dir_is_in_the_commands(tmp_path: Path) -> None:
    """A child without it would download the model a second time, to another place."""
    model = ModelConfig(pretrained_model_name_or_path="x/y", revision="abc", variant="fp16", cache_dir=str(tmp_path))
    assert model.flags() == {
        "pretrained_model_name_or_path": "x/y",
        "revision": "abc",
        "variant": "fp16",
        "cache_dir": str(tmp_path),
    }


def test_the_resolved_flags_are_saved(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--rank", 3, "--lr_scheduler", "cosine", "--random_flip", "no", "--timestep_shift", 2]
    run = train(script, prepared, tmp_path, *words)
    flags = json.loads((run.folder / "run.json").read_text())["flags"]
    assert set(flags) == {f.name for group in GROUPS for f in fields(group)}
    assert (flags["rank"], flags["lr_scheduler"], flags["random_flip"]) == (3, "cosine", False)
    assert (flags["timestep_shift"], flags["seed"], flags["lora_alpha"]) == (2.0, 0, None)


def test_the_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(TRAINING_SCRIPT).main(["--help_all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for group in GROUPS:
        for f in fields(group):
            assert re.search(rf"--{f.name}\b", text)
            assert f.metadata.get("help"), f.name


@pytest.mark.parametrize(("steps", "apart"), [(3, 50), (150, 50), (500, 50), (2000, 200), (10000, 500)])
def test_a_run_keeps_about_ten_checkpoints(steps: int, apart: int) -> None:
    """A tenth of the run, between 50 and 500 steps; README's run of 500 steps keeps something."""
    assert RunConfig().steps_to_checkpoint(steps) == apart
    assert RunConfig(checkpointing_steps=7).steps_to_checkpoint(steps) == 7
