"""The flags of the CLIPs' LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sd3_lora.common.command_line import less_than_one, require_right

DEFAULT_RATE = 5e-6  # of diffusers' script, likewise the weight decay
DEFAULT_WEIGHT_DECAY = 1e-3


@dataclass(frozen=True)
class TextEncoderFlags:
    """The LoRA of the two CLIPs."""

    train_text_encoder: bool = field(
        default=False,
        metadata={"help": "Train a LoRA of the two CLIPs too, on their attention; T5's part stays cached."},
    )
    text_encoder_lr: float | None = field(
        default=None,
        metadata={
            "help": f"Peak learning rate of the CLIPs. Default: {DEFAULT_RATE:g}; --learning_rate with prodigy, which "
            "has one rate for all."
        },
    )
    text_encoder_rank: int | None = field(default=None, metadata={"help": "Rank of the CLIPs' LoRA. Default: --rank."})
    stop_text_encoder_after: float | None = field(
        default=None,
        metadata={"help": "Share of the steps, such as 0.5, after which the CLIPs stay as they are. Default: never."},
    )
    adam_weight_decay_text_encoder: float | None = field(
        default=None, metadata={"help": f"Weight decay of the CLIPs' LoRA. Default: {DEFAULT_WEIGHT_DECAY:g}."}
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not self.train_text_encoder and each.name != "train_text_encoder":
                yield f"--{each.name} {value:g} is of --train_text_encoder: add that, or leave it out"
        yield from less_than_one(self, "text_encoder_rank")
        if self.text_encoder_lr is not None and not 0 < self.text_encoder_lr < math.inf:
            yield f"--text_encoder_lr {self.text_encoder_lr:g} must be positive"
        if self.stop_text_encoder_after is not None and not 0 < self.stop_text_encoder_after < 1:
            yield (
                f"--stop_text_encoder_after {self.stop_text_encoder_after:g} is a share of the steps, between 0 and 1: "
                "type for example 0.5"
            )
        if self.adam_weight_decay_text_encoder is not None and not self.adam_weight_decay_text_encoder >= 0:
            yield f"--adam_weight_decay_text_encoder {self.adam_weight_decay_text_encoder:g} must not be negative"

    def rank(self, usual: int) -> int:
        """text_encoder_rank, or the transformer's."""
        return usual if self.text_encoder_rank is None else self.text_encoder_rank

    @property
    def weight_decay(self) -> float:
        """adam_weight_decay_text_encoder, or its default."""
        given = self.adam_weight_decay_text_encoder
        return DEFAULT_WEIGHT_DECAY if given is None else given

    def last_step(self, steps: int) -> int | None:
        """The last optimizer step that changes the CLIPs, of a run of so many; None for each or none."""
        share = self.stop_text_encoder_after
        return None if share is None else max(1, math.floor(share * steps + 1e-9))

    def identity(self, rate: float, usual_rank: int) -> dict[str, Any]:
        """Flag → what decides the numbers, alike for all ways to ask for the same.

        Args:
            rate: at which the CLIPs are trained.
            usual_rank: the transformer's.
        """
        values = {f"--{name}": value for name, value in asdict(self).items()}
        if self.train_text_encoder:
            values |= {
                "--text_encoder_lr": rate,
                "--text_encoder_rank": self.rank(usual_rank),
                "--adam_weight_decay_text_encoder": self.weight_decay,
            }
        return values
