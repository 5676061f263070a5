"""The flags for looking at a run while it trains: pictures, LoRAs to pick the best from, and an early warning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from sd3_lora.common.command_line import less_than_one, require_right, split_prompt


def _aliases(*names: str) -> list[str]:
    """Other names of a flag, each with its twin with hyphens."""
    return [f"--{spelling}" for name in names for spelling in dict.fromkeys((name, name.replace("_", "-")))]


def _number_of_steps(text: str, *aliases: str) -> Any:
    return field(default=None, metadata={"aliases": _aliases(*aliases), "help": text})


@dataclass(frozen=True)
class WatchFlags:
    """Looking at the run while it trains. None of these flags changes a number of it."""

    validation_prompt: list[str] = field(
        default_factory=list,
        metadata={
            "aliases": _aliases("save_sample_prompt", "test_prompt"),
            "action": "extend",
            "help": "What to draw while training; may be repeated. Stage one must have embedded it.",
        },
    )
    validation_prompts_file: str | None = field(
        default=None,
        metadata={
            "aliases": _aliases("test_prompts_file"),
            "help": "Text file with more such prompts, one a line; # begins a comment.",
        },
    )
    num_validation_images: int = field(
        default=1,
        metadata={
            "aliases": _aliases("n_save_sample", "test_num_per_prompt"),
            "help": "Pictures of each prompt (diffusers: 4).",
        },
    )
    validation_steps: int | None = _number_of_steps(
        "Optimizer steps from one drawing to the next. Default: with --validation_epochs by those; else with each LoRA "
        "of --save_every_n_steps; else with each checkpoint."
    )
    validation_epochs: int | None = _number_of_steps(
        "Passes over the pictures from one drawing to the next (diffusers: 50)."
    )
    validation_with_saves: bool = field(
        default=False,
        metadata={
            "aliases": _aliases("auto_test_model"),
            "help": "Draw with each LoRA of --save_every_n_steps too, where another flag says when to draw.",
        },
    )
    validation_negative_prompt: str = field(
        default="",
        metadata={
            "aliases": _aliases("test_negative_prompt", "save_sample_negative_prompt"),
            "help": "What not to draw.",
        },
    )
    validation_num_steps: int = field(
        default=28,
        metadata={
            "aliases": _aliases("validation_num_inference_steps", "save_infer_steps"),
            "help": "Denoising steps of a picture.",
        },
    )
    validation_guidance: float = field(
        default=7.0,
        metadata={
            "aliases": _aliases("validation_guidance_scale", "save_guidance_scale"),
            "help": "Classifier-free guidance; 1 or less is without.",
        },
    )
    validation_seed: int = field(
        default=0,
        metadata={
            "aliases": _aliases("test_seed"),
            "help": "Of the starting noise, the same each time and that of inference.py --seed.",
        },
    )
    save_every_n_steps: int | None = _number_of_steps(
        "Optimizer steps from one LoRA to the next, written beside the others as …-step00000500.safetensors.",
        "save_interval",
        "save_model_every_n_steps",
    )
    early_warning_steps: int | None = _number_of_steps(
        "Optimizer steps from one early warning to the next: losses at fixed noise on crops that are held back, and of "
        "the class prompt (docs/watching.md). Default: none."
    )

    def __post_init__(self) -> None:
        require_right([*self._faults(), *self._without_effect()])

    def _faults(self) -> Iterator[str]:
        names = ("num_validation_images", "validation_steps", "validation_epochs", "validation_num_steps")
        yield from less_than_one(self, *names, "save_every_n_steps", "early_warning_steps")
        yield from split_prompt("validation_prompt", self.validation_prompt)
        if self.validation_seed < 0:
            yield f"--validation_seed {self.validation_seed} must be at least 0"
        if not math.isfinite(self.validation_guidance):
            yield f"--validation_guidance {self.validation_guidance:g} must be a finite number"
        if self.validation_with_saves and self.save_every_n_steps is None:
            yield "--validation_with_saves needs --save_every_n_steps: type a number of steps, or leave it out"

    def _without_effect(self) -> Iterator[str]:
        if self.draws:
            return
        for each in fields(self):
            if each.name not in self._NOT_OF_PICTURES and getattr(self, each.name) != each.default:
                yield (
                    f'--{each.name} draws nothing without a prompt: add --validation_prompt "a photo of sks dog", or '
                    "leave it out"
                )

    _NOT_OF_PICTURES = ("validation_prompt", "validation_prompts_file", "save_every_n_steps", "early_warning_steps")

    def stage_one_flags(self) -> dict[str, Any]:
        """The flags with which compute_embeddings.py embeds what is drawn."""
        return {
            "validation_prompt": self.validation_prompt,
            "prompts_file": [] if self.validation_prompts_file is None else [self.validation_prompts_file],
            "negative_prompt": self.validation_negative_prompt or None,  # the empty one is always embedded
        }

    @property
    def draws(self) -> bool:
        """Whether any picture is drawn."""
        return bool(self.validation_prompt or self.validation_prompts_file)

    def saves_at(self, step: int) -> bool:
        """Whether a LoRA is written after this optimizer step, for the user to pick from."""
        return self.save_every_n_steps is not None and step % self.save_every_n_steps == 0

    def measures_at(self, step: int) -> bool:
        """Whether the early warning's losses are measured after this optimizer step; 0 is before the first."""
        return self.early_warning_steps is not None and step % self.early_warning_steps == 0

    def draws_at(self, step: int, steps_of_epoch: float, checkpoint: bool, last: bool = False) -> bool:
        """Whether pictures are drawn after this optimizer step.

        Args:
            step: 0 is before the first.
            steps_of_epoch: optimizer steps of a pass over the pictures, which may end within one.
            checkpoint: whether a checkpoint is written after it.
            last: whether it is the last one.
        """
        if last or not self.draws:
            return self.draws
        asked = self.validation_steps is not None or self.validation_epochs is not None
        if self.saves_at(step) and (self.validation_with_saves or not asked):
            return True
        if self.validation_steps is not None and step % self.validation_steps == 0:
            return True
        if self.validation_epochs is not None:
            apart = self.validation_epochs * steps_of_epoch
            return math.floor(step / apart) > math.floor((step - 1) / apart)
        return checkpoint and not asked and self.save_every_n_steps is None
