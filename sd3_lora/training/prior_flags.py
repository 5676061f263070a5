"""The flags of prior preservation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from sd3_lora.common.command_line import less_than_one, require_right

PriorTerm = Literal["prediction", "preference"]
# The flags of prior preservation that do nothing unless one of these is there too.
_PRIOR_FLAGS = {
    ("--with_prior_preservation",): (
        "class_data_dir",
        "class_captions",
        "class_prompts_file",
        "num_class_images",
        "prior_loss_weight",
        "prior_generation_precision",
        "sample_batch_size",
    ),
    ("--with_prior_preservation", "--prior_term prediction"): ("class_prompt",),
    ("--prior_term",): ("prior_term_weight",),
    ("--prior_term prediction",): ("prior_share", "prior_prompts_file"),
}


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation, against drift: by pictures of the subject's class, or by what the base itself predicts."""

    with_prior_preservation: bool = field(
        default=False,
        metadata={"help": "Train on as many class pictures as pictures of the subject, --train_batch_size of each."},
    )
    prior_term: PriorTerm | None = field(
        default=None,
        metadata={
            "help": "Prior preservation without class pictures (docs/prior.md). prediction: what the base predicts for "
            "the class prompt on the same noisy latents is to stay. preference: a picture is learned until the base "
            "predicts it worse."
        },
    )
    class_prompt: str | None = field(
        default=None,
        metadata={
            "help": "The instance prompt without the identifier: 'a photo of a dog'. --prior_term prediction takes "
            "stage one's where it is not given."
        },
    )
    class_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of class pictures; those that are missing are drawn into it by the model itself. Default: "
            "those of --concepts_list, with their class prompts."
        },
    )
    class_captions: bool = field(
        default=False,
        metadata={
            "help": "Class pictures have the captions beside them (dog.txt for dog.jpg); those without have the class "
            "prompt (diffusers: all have)."
        },
    )
    class_prompts_file: str | None = field(
        default=None,
        metadata={"help": "Text file with the prompts of class pictures that are to be drawn, one a line."},
    )
    num_class_images: int = field(default=100, metadata={"help": "How many class pictures of a folder."})
    prior_loss_weight: float = field(
        default=1.0, metadata={"help": "The loss is the subject's plus so many times the class pictures'."}
    )
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "Of the transformer that draws them; no is fp32. Default: fp16 on a GPU, fp32 on a CPU."},
    )
    sample_batch_size: int = field(default=4, metadata={"help": "Class pictures drawn together, or as many as fit."})
    prior_term_weight: float | None = field(
        default=None,
        metadata={
            "help": "Of prediction: the loss is the subject's plus so many times the term. Of preference: the larger, "
            "the earlier a picture is learned enough. Default: 1; 10 of preference."
        },
    )
    prior_share: float = field(
        default=0.25,
        metadata={"help": "Part of the pictures on which prediction is measured; the term's weight stays the same."},
    )
    prior_prompts_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file with more prompts for prediction, one a line, taken at random; stage one embeds them."
        },
    )

    def __post_init__(self) -> None:
        require_right([*self._faults(), *self._without_effect()])

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(self, "num_class_images", "sample_batch_size")
        if not 0 <= self.prior_loss_weight < math.inf:
            yield f"--prior_loss_weight {self.prior_loss_weight:g} must be a finite number, not negative"
        if self.prior_term_weight is not None and not 0 < self.prior_term_weight < math.inf:
            yield f"--prior_term_weight {self.prior_term_weight:g} must be positive: leave --prior_term out for none"
        if not 0 < self.prior_share <= 1:
            yield f"--prior_share {self.prior_share:g} must be more than 0 and at most 1: 0.25 is a quarter"
        if not self.with_prior_preservation:
            return
        if self.class_prompts_file is not None and not self.class_captions:
            yield "--class_prompts_file needs --class_captions, which trains on these prompts: add it"
        if self.prior_term is not None:
            yield (
                "--with_prior_preservation and --prior_term are two ways of prior preservation, with and without class "
                "pictures: leave one out"
            )
        if self.class_data_dir is not None or self.class_prompt is not None:
            yield from self.lacking()

    def lacking(self) -> Iterator[str]:
        """What class pictures need and flags do not say; a concepts list may say both."""
        if self.class_prompt is None:
            yield (
                "--with_prior_preservation needs the prompt without the identifier: type --class_prompt "
                '"a photo of a dog"'
            )
        if self.class_data_dir is None:
            yield (
                "--with_prior_preservation needs a folder of class pictures, or an empty one to draw them into: type "
                "--class_data_dir FOLDER"
            )

    def _without_effect(self) -> Iterator[str]:
        """Flags of a way that is not taken."""
        in_force = {"--with_prior_preservation": self.with_prior_preservation, "--prior_term": bool(self.prior_term)}
        in_force["--prior_term prediction"] = self.predicts
        for owners, names in _PRIOR_FLAGS.items():
            if not any(in_force[owner] for owner in owners):
                which = "that" if len(owners) == 1 else "one of them"
                yield from (
                    f"--{name} has no effect without {' or '.join(owners)}: add {which}, or leave --{name} out"
                    for name in names
                    if getattr(self, name) != getattr(type(self), name)
                )

    @property
    def pools(self) -> int:
        """How many pictures come for each of the subject, itself included."""
        return 2 if self.with_prior_preservation else 1

    @property
    def predicts(self) -> bool:
        """Whether pictures come once more with a prior prompt."""
        return self.prior_term == "prediction"

    @property
    def more(self) -> str:
        """What holds a drifting run back more than these flags do."""
        if self.prior_term is not None:
            return "raise --prior_term_weight"
        return "raise --prior_loss_weight" if self.with_prior_preservation else "add --with_prior_preservation"

    @property
    def term_weight(self) -> float:
        """prior_term_weight, or the term's own; 0 without a term."""
        own = {None: 0.0, "prediction": 1.0, "preference": 10.0}[self.prior_term]
        return own if self.prior_term_weight is None else self.prior_term_weight

    @property
    def share(self) -> Fraction:
        """prior_share, exactly as it was typed."""
        return Fraction(repr(float(self.prior_share)))

    def is_even(self, batch_size: int) -> bool:
        """Whether as many pictures of each micro-batch of this size come once more."""
        return not self.predicts or (self.share * batch_size).denominator == 1

    def rows(self, batch_size: int) -> tuple[int, int]:
        """The most rows that a micro-batch adds to the trained model's, and the most that the base gets."""
        added = math.ceil(self.share * batch_size) if self.predicts else 0
        return added, batch_size if self.prior_term == "preference" else added

    def identity(self) -> dict[str, object]:
        """The flags that decide the numbers of a run, beside the class pictures and the prior prompts themselves."""
        names = ("with_prior_preservation", "num_class_images", "prior_loss_weight", "prior_term", "prior_share")
        return {
            **{f"--{name}": getattr(self, name) for name in names},
            "--class_prompt": self.class_prompt if self.with_prior_preservation else None,
            "--prior_term_weight": self.term_weight if self.prior_term else None,
        }

    def sentence(self) -> str:
        """The term and its weight, to be added to a sentence; nothing without one."""
        if self.prior_term is None:
            return ""
        part = f" on {self.prior_share:g} of the pictures" if self.predicts and self.prior_share < 1 else ""
        return f", prior term {self.prior_term} × {self.term_weight:g}{part}"
