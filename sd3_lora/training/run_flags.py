"""The flags of the run itself: how long, how large, how precise, and where to."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from sd3_lora.common.command_line import less_than_one, require_right
from sd3_lora.common.config import ExportFormat
from sd3_lora.common.defaults import LORA_FOLDER

DEFAULT_STEPS = 500  # what the reference's notebook trains a subject of five pictures for


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
    export: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Write the LoRA for other programs too, beside it: kohya (sd-scripts, Forge, ComfyUI), a1111.",
        },
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
        for name in self.exports:
            if name not in get_args(ExportFormat):
                yield f"--export {name} is unknown: type {' or '.join(get_args(ExportFormat))}"
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
    def exports(self) -> list[str]:
        """The formats of export, each once; commas separate them too."""
        names = (name.strip() for entry in self.export for name in entry.split(","))
        return list(dict.fromkeys(name for name in names if name))

    @property
    def trackers(self) -> list[str]:
        """report_to as a list."""
        return [name.strip() for name in self.report_to.split(",") if name.strip()]
