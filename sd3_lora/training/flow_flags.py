"""The flags of the loss: how noise levels are drawn and errors weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from sd3_lora.common.command_line import require_right

WeightingScheme = Literal["logit_normal", "sigma_sqrt", "mode", "cosmap", "none"]


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
