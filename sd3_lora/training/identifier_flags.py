"""The flags of the identifier's embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from sd3_lora.common.command_line import less_than_one, require_right

DEFAULT_RATE = 5e-4  # of diffusers' textual inversion
_MOST_VECTORS = 32  # of 75 tokens that a prompt has in a CLIP
_DIFFUSERS_WORD = "TOK"  # that diffusers' advanced scripts look for where no word is given
_NEVER = 2**31
_TRAINS = ("train_identifier_embedding", "train_text_encoder_ti")


@dataclass(frozen=True)
class IdentifierFlags:
    """The embedding of the identifier in the two CLIPs (textual inversion)."""

    train_identifier_embedding: str | None = field(
        default=None,
        metadata={
            "aliases": ["--token_abstraction"],
            "help": "The identifier of the prompts, such as sks: its embedding in the two CLIPs is trained, and T5 "
            "reads the plain word. A file of its own beside the LoRA.",
        },
    )
    train_text_encoder_ti: bool = field(
        default=False,
        metadata={
            "help": f"diffusers' name: trains the embedding of --train_identifier_embedding, or {_DIFFUSERS_WORD} "
            "where that names no word."
        },
    )
    num_vectors: int | None = field(
        default=None,
        metadata={
            "aliases": ["--num_new_tokens_per_abstraction"],
            "help": "Vectors in the identifier's place. Default: as many as the word that they begin as has tokens.",
        },
    )
    initializer_word: str | None = field(
        default=None,
        metadata={
            "aliases": ["--initializer_concept"],
            "help": "The word as whose embedding the identifier's begins, such as dog. Default: the identifier itself.",
        },
    )
    identifier_lr: float | None = field(
        default=None,
        metadata={
            "help": f"Peak learning rate of the identifier's embedding. Default: {DEFAULT_RATE:g}; --learning_rate "
            "with prodigy, which has one rate for all."
        },
    )
    stop_identifier_after: float | None = field(
        default=None,
        metadata={
            "aliases": ["--train_text_encoder_ti_frac"],
            "help": "Share of the steps, such as 0.5, after which the identifier's embedding stays as it is. Default: "
            "never.",
        },
    )
    start_lora_after: float | None = field(
        default=None,
        metadata={
            "help": "Share of the steps, such as 0.3, in which the identifier's embedding is trained and the LoRA is "
            "not. 1: the embedding alone; the LoRA's file is all zeros, by which drawing finds it. Default: 0."
        },
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if self.word is None:
            for each in fields(self):
                value = getattr(self, each.name)
                if each.name not in _TRAINS and value is not None:
                    yield f"--{each.name} {value} is of --train_identifier_embedding: add that, or leave it out"
        elif not self.word.strip():
            yield "--train_identifier_embedding needs a word: type the identifier of your prompts, such as sks"
        yield from less_than_one(self, "num_vectors")
        if self.num_vectors is not None and self.num_vectors > _MOST_VECTORS:
            yield f"--num_vectors {self.num_vectors} leaves a prompt too little room: type at most {_MOST_VECTORS}"
        if self.identifier_lr is not None and not 0 < self.identifier_lr < math.inf:
            yield f"--identifier_lr {self.identifier_lr:g} must be positive"
        stop, start = self.stop_identifier_after, self.start_lora_after
        if stop is not None and not 0 < stop <= 1:
            yield f"--stop_identifier_after {stop:g} is a share of the steps, up to 1: type for example 0.5"
        if start is not None and not 0 <= start <= 1:
            yield f"--start_lora_after {start:g} is a share of the steps, from 0 to 1: type for example 0.3"
        elif stop is not None and start is not None and stop < start:
            yield (
                f"--stop_identifier_after {stop:g} and --start_lora_after {start:g} leave steps between them that "
                f"train nothing: type --start_lora_after {stop:g}, or less"
            )

    @property
    def word(self) -> str | None:
        """The identifier whose embedding is trained; None where none is."""
        given = self.train_identifier_embedding
        return _DIFFUSERS_WORD if given is None and self.train_text_encoder_ti else given

    @property
    def is_alone(self) -> bool:
        """Whether the LoRA is never trained."""
        return self.start_lora_after == 1

    @property
    def has_phases(self) -> bool:
        """Whether something is trained in some of the steps alone."""
        return self.start_lora_after not in (None, 0) or self.stop_identifier_after not in (None, 1)

    @property
    def vectors_at_most(self) -> int:
        """For the plan, which is made before the tokenizers are read; they take next to nothing."""
        return 0 if self.word is None else self.num_vectors or _MOST_VECTORS // 4

    def last_step(self, steps: int) -> int | None:
        """The last optimizer step that changes the embedding, of a run of so many; None for the run's last."""
        share = self.stop_identifier_after
        return None if share in (None, 1) else max(1, _share_of(share or 0, steps))

    def first_step_of_lora(self, steps: int) -> int:
        """The first optimizer step that changes the LoRA: 1, a later one, or one that never comes."""
        return _NEVER if self.is_alone else 1 + _share_of(self.start_lora_after or 0, steps)

    def identity(self, rate: float) -> dict[str, Any]:
        """Flag → what decides the numbers, alike for all ways to ask for the same.

        Args:
            rate: at which the embedding is trained.
        """
        trains = self.word is not None
        return {
            "--train_identifier_embedding": self.word,
            "--num_vectors": self.num_vectors,
            "--initializer_word": None if self.initializer_word == self.word else self.initializer_word,
            "--identifier_lr": rate if trains else None,
            "--stop_identifier_after": None if self.stop_identifier_after == 1 else self.stop_identifier_after,
            "--start_lora_after": self.start_lora_after or None,
        }


def _share_of(share: float, steps: int) -> int:
    return math.floor(share * steps + 1e-9)
