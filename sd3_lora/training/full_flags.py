"""The flag that trains the whole transformer in place of a LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

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
