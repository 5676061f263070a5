"""The flags of training, with diffusers' names and meanings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from sd3_lora.common.config import BudgetConfig, CropFlags, DeviceConfig, ModelConfig
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH, LORA_FOLDER

WeightingScheme = Literal["logit_normal", "sigma_sqrt", "mode", "cosmap", "none"]

DEFAULT_STEPS = 500  # what the reference's notebook trains a subject of five pictures for

# Flags of diffusers' scripts that are not here, with what to do instead.
REFUSED_FLAGS = {
    "with_prior_preservation": "prior preservation is not built yet; fewer --max_train_steps hold drift down",
    "class_data_dir": "prior preservation is not built yet; put all pictures in --instance_data_dir",
    "class_prompt": "prior preservation is not built yet; compute_embeddings.py takes --class_prompt",
    "num_class_images": "prior preservation is not built yet; leave it out",
    "prior_loss_weight": "prior preservation is not built yet; leave it out",
    "prior_generation_precision": "prior preservation is not built yet; leave it out",
    "sample_batch_size": "prior preservation is not built yet; leave it out",
    "train_text_encoder": "the text encoders are freed before training; only the transformer is trained",
    "text_encoder_lr": "the text encoders are freed before training; --learning_rate is the transformer's",
    "adam_weight_decay_text_encoder": "the text encoders are freed before training; leave it out",
    "validation_prompt": "draw with inference.py after training, or with --lora OUTPUT_DIR/checkpoint-N beside it",
    "num_validation_images": "inference.py takes --num_images",
    "validation_epochs": "draw a checkpoint with inference.py --lora OUTPUT_DIR/checkpoint-N",
    "dataset_name": "download the dataset and give its folder as --instance_data_dir",
    "dataset_config_name": "download the dataset and give its folder as --instance_data_dir",
    "image_column": "put the pictures in a folder, --instance_data_dir",
    "caption_column": "put captions beside the pictures: dog.txt for dog.jpg, or metadata.jsonl",
    "repeats": "pictures repeat by themselves; --max_train_steps says for how long",
    "cache_latents": "latents are always cached: run precompute_latents.py",
    "dataloader_num_workers": "batches come from the cached tensors; there is no loader to widen",
    "upcast_before_saving": "the LoRA is always trained and saved in float32",
    "push_to_hub": "type `hf upload YOUR_NAME/MODEL OUTPUT_DIR` after training",
    "hub_token": "type `hf auth login`, then `hf upload YOUR_NAME/MODEL OUTPUT_DIR` after training",
    "hub_model_id": "type `hf upload YOUR_NAME/MODEL OUTPUT_DIR` after training",
    "local_rank": "torchrun and accelerate launch pass it in the environment",
    "prodigy_beta3": "the optimizer is AdamW; leave it out",
    "prodigy_decouple": "the optimizer is AdamW; leave it out",
    "prodigy_use_bias_correction": "the optimizer is AdamW; leave it out",
    "prodigy_safeguard_warmup": "the optimizer is AdamW; leave it out",
}


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")


@dataclass(frozen=True)
class DataConfig(CropFlags):
    """What stage one left, and what of it to train on."""

    data_df_path: str = field(default=EMBEDDINGS_PATH, metadata={"help": "What compute_embeddings.py wrote."})
    latents_path: str = field(
        default=LATENTS_PATH,
        metadata={"help": "What precompute_latents.py wrote; where it is not there, that script is run first."},
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Checked against the embeddings file; default: whatever it holds."}
    )
    num_crops: int | None = field(
        default=None, metadata={"help": "Train on the crops that this many give; default: all in the cache."}
    )
    random_flip: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Train on the mirrored twins too; `--random_flip no` leaves them out. Default: as cached.",
        },
    )

    def __post_init__(self) -> None:
        _at_least_one(self, "num_crops")


@dataclass(frozen=True)
class LoraFlags:
    """The shape of the LoRA."""

    rank: int = field(default=4, metadata={"help": "Width of the update matrices."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / rank. Default: rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Chance of dropping an input of the LoRA."})
    lora_layers: str | None = field(
        default=None,
        metadata={"help": "Comma-separated layers, such as attn.to_k,attn.to_q. Default: all of joint attention."},
    )
    lora_blocks: str | None = field(
        default=None, metadata={"help": "Comma-separated indices of transformer blocks, such as 12,13. Default: all."}
    )

    def __post_init__(self) -> None:
        _at_least_one(self, "rank")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError("--lora_alpha must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError("--lora_dropout must be at least 0 and less than 1")
        if self.lora_blocks is not None and any(not block.strip().isdecimal() for block in self.lora_blocks.split(",")):
            raise ValueError(f"--lora_blocks {self.lora_blocks} is not a list of numbers: type for example 12,13")

    @property
    def alpha(self) -> float:
        """lora_alpha, or the rank."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def layers(self) -> list[str] | None:
        """lora_layers as a list."""
        return [layer.strip() for layer in self.lora_layers.split(",")] if self.lora_layers else None

    @property
    def blocks(self) -> list[int] | None:
        """lora_blocks as numbers."""
        return [int(block) for block in self.lora_blocks.split(",")] if self.lora_blocks else None


@dataclass(frozen=True)
class OptimizerConfig:
    """How the LoRA is updated."""

    optimizer: str = field(default="AdamW", metadata={"help": "AdamW is the one there is."})
    use_8bit_adam: bool = field(default=False, metadata={"help": "Keep AdamW's state in 8 bits (bitsandbytes)."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    scale_lr: bool = field(
        default=False, metadata={"help": "Multiply it by batch size, accumulation steps and processes."}
    )
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ] = field(default="constant", metadata={"help": "The schedule of the learning rate."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps of warmup, for schedules that warm up."})
    lr_num_cycles: int = field(default=1, metadata={"help": "Restarts of cosine_with_restarts."})
    lr_power: float = field(default=1.0, metadata={"help": "Power of polynomial."})
    lr_step_rules: str | None = field(
        default=None, metadata={"help": "Of piecewise_constant: 1:100,0.1 is full rate for 100 steps, then a tenth."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of AdamW's first moment."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay of AdamW's second moment."})
    adam_weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})

    def __post_init__(self) -> None:
        if self.optimizer.lower() != "adamw":
            raise ValueError(f"--optimizer {self.optimizer} is unknown: type --optimizer AdamW")
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise ValueError("--lr_scheduler piecewise_constant needs --lr_step_rules, for example 1:100,0.1")
        if self.lr_warmup_steps < 0 or self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("--learning_rate and --max_grad_norm must be positive, --lr_warmup_steps not negative")
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1):
            raise ValueError("--adam_beta1 and --adam_beta2 must be at least 0 and less than 1")
        if self.adam_weight_decay < 0 or self.adam_epsilon < 0:
            raise ValueError("--adam_weight_decay and --adam_epsilon must not be negative")


@dataclass(frozen=True)
class RunConfig:
    """How long, how large, how precise, and where to."""

    output_dir: str = field(default=LORA_FOLDER, metadata={"help": "Where the LoRA and the checkpoints go."})
    seed: int | None = field(default=None, metadata={"help": "Of every draw. Default: one is drawn and noted."})
    train_batch_size: int = field(default=1, metadata={"help": "Pictures in a micro-batch, for each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches in an optimizer step."})
    num_train_epochs: int | None = field(
        default=None, metadata={"help": "Passes over the pictures, in place of --max_train_steps."}
    )
    max_train_steps: int | None = field(
        default=None, metadata={"help": f"Optimizer steps. Default without --num_train_epochs: {DEFAULT_STEPS}."}
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "Of the frozen transformer. Default: as accelerate says, else fp16 on a GPU, fp32 on a CPU."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute all blocks anew in the backward pass. Default: as few as fit the GPU, if any."},
    )
    base_precision: Literal["16bit", "nf4", "auto"] = field(
        default="16bit",
        metadata={
            "help": "Of the frozen transformer. 16bit is exact (32 bits under --mixed_precision no); nf4 takes a "
            "quarter of it and changes the numbers; auto takes nf4 where 16bit does not fit on the device."
        },
    )
    compile: Literal["auto", "off", "blocks", "graph"] = field(
        default="auto",
        metadata={
            "help": "graph replays each micro-step as one CUDA graph, with the same numbers; blocks compiles the "
            "transformer's blocks as well, half a minute once, with other roundings; off does neither; auto does what "
            "the run can have and repays."
        },
    )
    allow_tf32: bool = field(default=False, metadata={"help": "Let float32 products use TF32 (Ampere or newer)."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Optimizer steps between checkpoints."})
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "How many checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "latest (or from the start where there is none), or a checkpoint's folder."}
    )
    report_to: str = field(
        default="tensorboard",
        metadata={"help": "tensorboard (when installed), wandb, comet_ml, all or none; comma-separated."},
    )
    logging_dir: str = field(default="logs", metadata={"help": "For trackers, below the output folder."})

    def __post_init__(self) -> None:
        _at_least_one(
            self,
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
        )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} must be at least 0 and less than 2**63")
        known = {"tensorboard", "wandb", "comet_ml", "all", "none"}
        unknown = [name for name in self.trackers if name not in known]
        if unknown:
            raise ValueError(f"--report_to {unknown[0]} is unknown: type tensorboard, wandb, comet_ml, all or none")

    def steps(self, pictures: int, processes: int) -> int:
        """Optimizer steps: as given, or as many as the epochs take, rounded up to whole windows."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is None:
            return DEFAULT_STEPS
        pictures_per_step = self.train_batch_size * self.gradient_accumulation_steps * processes
        return math.ceil(self.num_train_epochs * pictures / pictures_per_step)

    @property
    def trackers(self) -> list[str]:
        """report_to as a list."""
        return [name.strip() for name in self.report_to.split(",") if name.strip()]


@dataclass(frozen=True)
class FlowConfig:
    """How noise levels are drawn and errors weighted."""

    weighting_scheme: WeightingScheme = field(
        default="logit_normal",
        metadata={
            "help": "logit_normal and mode draw more of the middle noise levels; sigma_sqrt and cosmap weight the "
            "loss; none does neither."
        },
    )
    logit_mean: float = field(
        default=0.0,
        metadata={
            "help": "Of logit_normal. As in diffusers, whose table of timesteps descends: a positive mean draws LESS "
            "noise (the opposite of the paper's sign)."
        },
    )
    logit_std: float = field(default=1.0, metadata={"help": "Of logit_normal."})
    mode_scale: float = field(
        default=1.29, metadata={"help": "Of mode; in diffusers' descending table, as with --logit_mean."}
    )
    precondition_outputs: bool = field(
        default=False,
        metadata={
            "help": "Measure the error of the predicted picture instead of the velocity's (diffusers' larger script "
            "does): it multiplies the loss by sigma squared."
        },
    )
    timestep_shift: float | None = field(
        default=None, metadata={"help": "Replaces the shift of the model's own scheduler (3.0 in SD3)."}
    )

    def __post_init__(self) -> None:
        if self.logit_std < 0:
            raise ValueError("--logit_std must not be negative")
        if self.timestep_shift is not None and self.timestep_shift <= 0:
            raise ValueError("--timestep_shift must be positive: 3.0 is SD3's own")


@dataclass(frozen=True)
class TrainingFlags:
    """All the flags of training, by group, in the order of `--help`."""

    data: DataConfig
    lora: LoraFlags
    optimizer: OptimizerConfig
    run: RunConfig
    flow: FlowConfig
    model: ModelConfig
    device: DeviceConfig
    budget: BudgetConfig

    def groups(self) -> list[object]:
        """The groups, to save them."""
        return [getattr(self, f.name) for f in fields(self)]
