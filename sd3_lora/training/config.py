"""The flags of training, with diffusers' names and meanings."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, get_type_hints

from sd3_lora.common.command_line import HarmlessFlag, less_than_one, require_right
from sd3_lora.common.config import BudgetConfig, CropFlags, DeviceConfig, ModelConfig
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH, LORA_FOLDER
from sd3_lora.common.placement_flags import BaseFlags, StepFlags

PriorTerm = Literal["prediction", "preference"]
WeightingScheme = Literal["logit_normal", "sigma_sqrt", "mode", "cosmap", "none"]
# Those that reach their end with the run, so that a longer run has other rates.
ENDING_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial")
DEFAULT_STEPS = 500  # what the reference's notebook trains a subject of five pictures for

_LATER = "prior preservation is not built yet"
_DRAW = "draw a checkpoint with inference.py --lora OUTPUT_DIR/checkpoint-N"
_UPLOAD = "type `hf upload YOUR_NAME/MODEL OUTPUT_DIR` after training"
_FREED = "the text encoders are freed before training; only the transformer is trained"
_ADAMW = "the optimizer is AdamW, whose --learning_rate is about 1e-4; leave it out"
# Flags of diffusers' scripts that are not here, with what to do instead.
REFUSED_FLAGS = {
    "with_prior_preservation": f"{_LATER}; fewer --max_train_steps hold drift down",
    "class_data_dir": f"{_LATER}; leave it out, and keep class pictures out of --instance_data_dir",
    "class_prompt": f"{_LATER}; compute_embeddings.py takes --class_prompt",
    "num_class_images": f"{_LATER}; leave it out",
    "prior_loss_weight": f"{_LATER}; leave it out",
    "prior_generation_precision": f"{_LATER}; leave it out",
    "sample_batch_size": f"{_LATER}; leave it out",
    "train_text_encoder": _FREED,
    "text_encoder_lr": f"{_FREED}, at --learning_rate",
    "adam_weight_decay_text_encoder": f"{_FREED}; leave it out",
    "validation_prompt": _DRAW,
    "num_validation_images": "inference.py takes --num_images",
    "validation_epochs": _DRAW,
    "dataset_name": "download the dataset and give its folder as --instance_data_dir",
    "dataset_config_name": "download the dataset and give its folder as --instance_data_dir",
    "image_column": "put the pictures in a folder, --instance_data_dir",
    "caption_column": "put captions beside the pictures: dog.txt for dog.jpg, or metadata.jsonl",
    "push_to_hub": _UPLOAD,
    "hub_token": f"type `hf auth login`; then {_UPLOAD}",
    "hub_model_id": _UPLOAD,
    "prodigy_beta3": _ADAMW,
    "prodigy_decouple": _ADAMW,
    "prodigy_use_bias_correction": _ADAMW,
    "prodigy_safeguard_warmup": _ADAMW,
}
# Those that ask for what is always so.
HARMLESS_FLAGS = {
    "cache_latents": HarmlessFlag("latents are always cached"),
    "dataloader_num_workers": HarmlessFlag("batches come from cached tensors, without a loader", takes_value=True),
    "upcast_before_saving": HarmlessFlag("the LoRA is always trained and saved in float32"),
    "local_rank": HarmlessFlag("torchrun and accelerate launch pass it in the environment", takes_value=True),
    "repeats": HarmlessFlag(
        "each picture comes once in a pass",
        takes_value=True,
        only="1",
        otherwise="pictures repeat by themselves; --max_train_steps says for how long",
    ),
}


@dataclass(frozen=True)
class DataConfig(CropFlags):
    """What stage one left, and what of it to train on."""

    data_df_path: str = field(default=EMBEDDINGS_PATH, metadata={"help": "What compute_embeddings.py wrote."})
    latents_path: str = field(
        default=LATENTS_PATH,
        metadata={"help": "What precompute_latents.py wrote; where it is not there, that script is run first."},
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "Checked against the embeddings file. Default: whatever it holds (diffusers: 77)."},
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
        require_right(less_than_one(self, "num_crops"))


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
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(self, "rank")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            yield "--lora_alpha must be positive"
        if not 0 <= self.lora_dropout < 1:
            yield "--lora_dropout must be at least 0 and less than 1"
        if self.lora_blocks is not None and any(not block.strip().isdecimal() for block in self.lora_blocks.split(",")):
            yield f"--lora_blocks {self.lora_blocks} is not a list of numbers: type for example 12,13"

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
    lr_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps of warmup, for schedules that warm up (diffusers: 500)."}
    )
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
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if self.optimizer.lower() != "adamw":
            rate = ", with a --learning_rate of about 1e-4" if self.optimizer.lower() == "prodigy" else ""
            yield f"--optimizer {self.optimizer} is unknown: type --optimizer AdamW{rate}"
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            yield "--lr_scheduler piecewise_constant needs --lr_step_rules, for example 1:100,0.1"
        if not (self.learning_rate > 0 and self.max_grad_norm > 0) or self.lr_warmup_steps < 0:
            yield "--learning_rate and --max_grad_norm must be positive, --lr_warmup_steps not negative"
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1):
            yield "--adam_beta1 and --adam_beta2 must be at least 0 and less than 1"
        if not (self.adam_weight_decay >= 0 and self.adam_epsilon >= 0):
            yield "--adam_weight_decay and --adam_epsilon must not be negative"

    def scaled_rate(self, pictures_per_step: int) -> float:
        """The learning rate, multiplied under --scale_lr."""
        return self.learning_rate * (pictures_per_step if self.scale_lr else 1)


@dataclass(frozen=True)
class RunConfig:
    """How long, how large, how precise, and where to."""

    output_dir: str = field(default=LORA_FOLDER, metadata={"help": "Where the LoRA and the checkpoints go."})
    seed: int | None = field(default=None, metadata={"help": "Of every draw. Default: one is drawn and noted."})
    train_batch_size: int = field(
        default=1, metadata={"help": "Pictures in a micro-batch, for each process (diffusers: 4)."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches in an optimizer step."})
    num_train_epochs: int | None = field(
        default=None, metadata={"help": "Passes over the pictures, in place of --max_train_steps (diffusers: 1)."}
    )
    max_train_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Optimizer steps. Default without --num_train_epochs: {DEFAULT_STEPS} (diffusers: one epoch)."
        },
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None,
        metadata={
            "help": "Of the frozen transformer. Default: accelerate's setting, else fp16 on a GPU (diffusers: no), "
            "fp32 on a CPU."
        },
    )
    allow_tf32: bool = field(default=False, metadata={"help": "Let float32 products use TF32 (Ampere or newer)."})
    checkpointing_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between checkpoints. Default: a tenth of the run, but at least 50 and at most 500 "
            "(diffusers: 500)."
        },
    )
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "How many checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "latest (or from the start where there is none), or a checkpoint's folder."}
    )
    report_to: str = field(
        default="tensorboard",
        metadata={"help": "tensorboard (when installed), wandb, comet_ml, all or none; comma-separated."},
    )
    logging_dir: str = field(
        default="logs", metadata={"help": "For trackers: a folder in the output folder, or a full path."}
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(
            self,
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
        )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            yield f"--seed {self.seed} must be at least 0 and less than 2**63"
        if os.path.normpath(self.logging_dir).split(os.sep)[0] == os.pardir:
            yield f"--logging_dir {self.logging_dir} leaves the output folder: type a name such as logs, or a full path"
        known = {"tensorboard", "wandb", "comet_ml", "all", "none"}
        for name in self.trackers:
            if name not in known:
                yield f"--report_to {name} is unknown: type tensorboard, wandb, comet_ml, all or none"

    def steps(self, pictures: int, processes: int) -> int:
        """Optimizer steps: as given, or as many as the epochs take, rounded up to whole windows."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is None:
            return DEFAULT_STEPS
        return math.ceil(self.num_train_epochs * pictures / self.pictures_per_step(processes))

    def steps_to_checkpoint(self, steps: int) -> int:
        """Optimizer steps between checkpoints of a run of so many.

        Unless a flag says how many, there are about ten: enough that a lost machine costs a tenth of a run, and few
        enough for a disk. They are 50 steps apart at least, so that saving takes no time to speak of, and 500 at most.
        """
        return self.checkpointing_steps or min(500, max(50, steps // 10))

    def pictures_per_step(self, processes: int) -> int:
        """Pictures of an optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

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
            "help": "Measure the error of the predicted picture instead of the velocity's: it multiplies the loss by "
            "sigma squared (diffusers: on in train_dreambooth_lora_sd3.py, which --precondition_outputs 1 asks for)."
        },
    )
    timestep_shift: float | None = field(
        default=None, metadata={"help": "Replaces the shift of the model's own scheduler (3.0 in SD3)."}
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.logit_std >= 0:
            yield "--logit_std must not be negative"
        if self.timestep_shift is not None and not self.timestep_shift > 0:
            yield "--timestep_shift must be positive: 3.0 is SD3's own"


@dataclass(frozen=True)
class PriorConfig:
    """What keeps the trained model near its base, without class pictures."""

    prior_term: PriorTerm | None = field(
        default=None,
        metadata={
            "help": "prediction: keep what the model predicts for the class prompt, on the same noisy latents, as the "
            "base predicts it. preference: learn from a picture only as far as the base predicts it no better. "
            "Default: neither."
        },
    )
    prior_term_weight: float = field(
        default=1.0, metadata={"help": "Of prediction beside the loss; of preference how early it stops to learn."}
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not (self.prior_term_weight > 0 and math.isfinite(self.prior_term_weight)):
            yield "--prior_term_weight must be positive: leave --prior_term out to train without one"
        elif self.prior_term is None and self.prior_term_weight != 1:
            yield "--prior_term_weight is of a prior term, and there is none: add --prior_term prediction"

    @property
    def prompts_a_picture(self) -> int:
        """How many prompts the trained model is called with for each picture: its own, and the class prompt."""
        return 2 if self.prior_term == "prediction" else 1


@dataclass(frozen=True)
class TrainingFlags:
    """All the flags of training, by group, in the order of `--help`."""

    data: DataConfig
    lora: LoraFlags
    optimizer: OptimizerConfig
    run: RunConfig
    base: BaseFlags
    step: StepFlags
    flow: FlowConfig
    prior: PriorConfig
    model: ModelConfig
    device: DeviceConfig
    budget: BudgetConfig

    def in_force(self, resolution: int, steps: int, processes: int) -> str:
        """One line with the settings that most decide what is learned, defaults included.

        Args:
            resolution: of the crops, in pixels.
            steps: optimizer steps in all.
            processes: how many.
        """
        run, optimizer = self.run, self.optimizer
        rate = optimizer.scaled_rate(run.pictures_per_step(processes))
        warms_up = optimizer.lr_scheduler not in ("constant", "piecewise_constant") and optimizer.lr_warmup_steps > 0
        term, weight = self.prior.prior_term, self.prior.prior_term_weight
        return (
            f"{resolution} px, batch {run.train_batch_size} × accumulation {run.gradient_accumulation_steps} × "
            f"processes {processes}, {steps} steps, learning rate {rate:g} {optimizer.lr_scheduler}"
            + (f" after {optimizer.lr_warmup_steps} steps of warmup" if warms_up else "")
            + f", weighting {self.flow.weighting_scheme}, precondition_outputs "
            + ("on" if self.flow.precondition_outputs else "off")
            + (f", prior term {term} × {weight:g}" if term else "")
        )

    def groups(self) -> list[object]:
        """The groups, to save them."""
        return [getattr(self, f.name) for f in fields(self)]

    @classmethod
    def classes(cls) -> list[type]:
        """The groups' classes, to parse them."""
        return list(get_type_hints(cls).values())
