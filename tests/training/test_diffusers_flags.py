"""Every flag of diffusers' scripts: taken and with its value, or harmless.

The scripts are examples/dreambooth/train_dreambooth_lora_sd3.py and
examples/research_projects/sd3_lora_colab/train_dreambooth_lora_sd3_miniature.py of commit 58eb52c.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

from sd3_lora.common.command_line import Secret
from sd3_lora.common.config import groups_of
from sd3_lora.training.config import HARMLESS_FLAGS, REFUSED_FLAGS, TrainingFlags

import pytest
from conftest import TRAINING_SCRIPT

# Flag → what is typed behind it, and the value that it must have; None where it is typed alone.
TAKEN: dict[str, tuple[str | None, Any]] = {
    "adam_beta1": ("0.9", 0.9),
    "adam_beta2": ("0.999", 0.999),
    "adam_epsilon": ("1e-08", 1e-8),
    "adam_weight_decay": ("1e-04", 1e-4),
    "adam_weight_decay_text_encoder": ("1e-03", 1e-3),
    "allow_tf32": (None, True),
    "cache_dir": ("cache", "cache"),
    "caption_column": ("text", "text"),
    "center_crop": (None, True),
    "checkpointing_steps": ("500", 500),
    "checkpoints_total_limit": ("3", 3),
    "class_data_dir": ("dogs", "dogs"),
    "class_prompt": ("a photo of a dog", "a photo of a dog"),
    "data_df_path": ("sample_embeddings.parquet", "sample_embeddings.parquet"),
    "dataset_config_name": ("default", "default"),
    "dataset_name": ("Norod78/Yarn-art-style", "Norod78/Yarn-art-style"),
    "gradient_accumulation_steps": ("4", 4),
    "gradient_checkpointing": (None, True),
    "hub_model_id": ("alice/dog", "alice/dog"),
    "hub_token": ("hf_abc", Secret("hf_abc")),
    "image_column": ("image", "image"),
    "instance_data_dir": ("dog", "dog"),
    "instance_prompt": ("a photo of sks dog", "a photo of sks dog"),
    "learning_rate": ("4e-4", 4e-4),
    "logging_dir": ("logs", "logs"),
    "logit_mean": ("0.0", 0.0),
    "logit_std": ("1.0", 1.0),
    "lora_blocks": ("12,30", "12,30"),
    "lora_dropout": ("0.1", 0.1),
    "lora_layers": ("attn.to_k,attn.to_q", "attn.to_k,attn.to_q"),
    "lr_num_cycles": ("2", 2),
    "lr_power": ("1.5", 1.5),
    "lr_scheduler": ("cosine_with_restarts", "cosine_with_restarts"),
    "lr_warmup_steps": ("0", 0),
    "max_grad_norm": ("1.0", 1.0),
    "max_sequence_length": ("77", 77),
    "max_train_steps": ("500", 500),
    "mixed_precision": ("fp16", "fp16"),
    "mode_scale": ("1.29", 1.29),
    "num_class_images": ("200", 200),
    "num_train_epochs": ("1", 1),
    "optimizer": ("AdamW", "AdamW"),
    "output_dir": ("trained-sd3-lora", "trained-sd3-lora"),
    "precondition_outputs": ("1", True),
    "pretrained_model_name_or_path": ("miniature", "miniature"),
    "prior_generation_precision": ("fp32", "fp32"),
    "prior_loss_weight": ("0.5", 0.5),
    "prodigy_beta3": ("0.9", 0.9),
    "prodigy_decouple": ("True", True),
    "prodigy_safeguard_warmup": ("True", True),
    "prodigy_use_bias_correction": ("True", True),
    "push_to_hub": (None, True),
    "random_flip": (None, True),
    "rank": ("32", 32),
    "repeats": ("2", 2),
    "report_to": ("wandb", "wandb"),
    "resolution": ("1024", 1024),
    "resume_from_checkpoint": ("latest", "latest"),
    "revision": ("main", "main"),
    "sample_batch_size": ("2", 2),
    "scale_lr": (None, True),
    "seed": ("0", 0),
    "text_encoder_lr": ("5e-6", 5e-6),
    "train_batch_size": ("1", 1),
    "train_text_encoder": (None, True),
    "use_8bit_adam": (None, True),
    "variant": ("fp16", "fp16"),
    "weighting_scheme": ("sigma_sqrt", "sigma_sqrt"),
    "with_prior_preservation": (None, True),
    "num_validation_images": ("3", 3),
    "validation_epochs": ("7", 7),
    "validation_prompt": ("a photo", ["a photo"]),
}
# What diffusers, too, needs beside a flag (--push_to_hub it does not ask for: without it these change nothing).
PRIOR = ["--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir", "dogs"]
BESIDE: dict[str, list[str]] = {
    **{name: ["--train_text_encoder"] for name in ("adam_weight_decay_text_encoder", "text_encoder_lr")},
    "num_validation_images": ["--validation_prompt", "a photo"],
    "validation_epochs": ["--validation_prompt", "a photo"],
    **{name: ["--push_to_hub"] for name in ("hub_model_id", "hub_token")},
    **{name: ["--dataset_name", "yarn"] for name in ("caption_column", "dataset_config_name", "image_column")},
    **dict.fromkeys(("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"), PRIOR),
    **dict.fromkeys(("prior_generation_precision", "sample_batch_size", "with_prior_preservation"), PRIOR),
    **{
        f"prodigy_{name}": ["--optimizer", "prodigy"]
        for name in ("beta3", "decouple", "safeguard_warmup", "use_bias_correction")
    },
}
HARMLESS = {"cache_latents", "dataloader_num_workers", "local_rank", "upcast_before_saving"}


def parse(*words: str) -> dict[str, Any]:
    flags = TrainingFlags(*importlib.import_module(TRAINING_SCRIPT).COMMAND_LINE.parse(words))
    return {name: value for group in groups_of(flags) for name, value in asdict(group).items()}  # type: ignore[call-overload]


def test_none_is_refused() -> None:
    assert not REFUSED_FLAGS
    assert HARMLESS_FLAGS.keys() == HARMLESS
    assert not TAKEN.keys() & HARMLESS
    assert len(TAKEN) + len(HARMLESS) == 76  # 75 of the one script, and --data_df_path of the other


@pytest.mark.parametrize("flag", TAKEN)
def test_a_flag_has_its_value(flag: str) -> None:
    """As both of argparse's spellings, `--flag value` and `--flag=value`, have it."""
    typed, value = TAKEN[flag]
    beside = BESIDE.get(flag, [])
    spellings = [[f"--{flag}"]] if typed is None else [[f"--{flag}", typed], [f"--{flag}={typed}"]]
    for words in spellings:
        assert parse(*beside, *words)[flag] == value
