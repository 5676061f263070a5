"""The flag that trains the whole transformer in place of a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from sd3_lora.common.command_line import require_right

WeightRounding = Literal["stochastic", "nearest"]
FULL_RATE = 1e-5  # the default learning rate: a LoRA's would be far too high


@dataclass(frozen=True)
class FullFlags:
    """Training of the whole transformer."""

    full: bool = field(
        default=False,
        metadata={
            "help": "Train all of the transformer's weights, not a LoRA, as diffusers' train_dreambooth_sd3.py; writes "
            f"a whole model. AdamW's state is in 8 bits; the default --learning_rate is {FULL_RATE:g} (docs/full.md)."
        },
    )
    weight_rounding: WeightRounding = field(
        default="stochastic",
        metadata={
            "help": "How an updated weight of --full becomes bf16: up or down by chance, right on average, or to the "
            "nearest, which loses most updates."
        },
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if self.weight_rounding != "stochastic" and not self.full:
            yield f"--weight_rounding {self.weight_rounding} is of --full: add that, or leave it out"
