"""The flags of the optimizer and of its learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sd3_lora.common.command_line import require_right
from sd3_lora.training.optimizer_kinds import (
    ADAMW,
    ADAMW_8BIT,
    ADAMW_SPELLINGS,
    KINDS,
    PRODIGY,
    SCHEDULE_FREE_ADAMW,
    OptimizerKind,
    find_kind,
)

# Those that reach their end with the run, so that a longer run has other rates.
ENDING_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial")


def _prodigy_switch(text: str) -> Any:
    """A flag of Prodigy that is on unless it says no."""
    return field(default=None, metadata={"nargs": "?", "const": True, "help": f"{text} Default: yes."})


@dataclass(frozen=True)
class OptimizerConfig:
    """How the LoRA is updated."""

    optimizer: str = field(
        default=ADAMW.name,
        metadata={"help": f"{', '.join(kind.name for kind in KINDS)}: each from its library (docs/optimizers.md)."},
    )
    use_8bit_adam: bool = field(default=False, metadata={"help": "Keep AdamW's state in 8 bits (bitsandbytes)."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Peak learning rate. Default: {ADAMW.learning_rate:g}; 1 with prodigy, which multiplies it."
        },
    )
    lr_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Learning rates of single layers or of parts of them, such as attn=5e-5,ff.net.2.lora_B=1e-3; the "
            "first that fits counts, and others have --learning_rate."
        },
    )
    scale_lr: bool = field(
        default=False, metadata={"help": "Multiply the learning rates by batch size, accumulation steps and processes."}
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
    adam_beta1: float | None = field(
        default=None,
        metadata={"help": "Decay of the first moment (adafactor has none). Default: 0.9."},
    )
    adam_beta2: float | None = field(
        default=None,
        metadata={"help": "Decay of the second moment (adafactor has its own). Default: 0.999; 0.99 with lion_8bit."},
    )
    adam_weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of the optimizer."})
    adam_epsilon: float | None = field(
        default=None,
        metadata={"help": "Epsilon of the optimizer (lion_8bit has none, adafactor its own). Default: 1e-8."},
    )
    prodigy_beta3: float | None = field(
        default=None, metadata={"help": "Decay of Prodigy's averages. Default: the square root of --adam_beta2."}
    )
    prodigy_decouple: bool | None = _prodigy_switch("Prodigy decays weights as AdamW does, not as Adam.")
    prodigy_use_bias_correction: bool | None = _prodigy_switch("Prodigy corrects its moments' bias, as Adam.")
    prodigy_safeguard_warmup: bool | None = _prodigy_switch("Prodigy's estimate leaves out the rate while it warms up.")
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})

    def __post_init__(self) -> None:
        if find_kind(self.optimizer) is None:
            names = ", ".join(kind.name for kind in KINDS)
            require_right([f"--optimizer {self.optimizer} is unknown: type one of {names}"])
        require_right([*self._misfits(), *self._rate_faults(), *self._faults()])

    @property
    def kind(self) -> OptimizerKind:
        """Of the optimizer."""
        kind = find_kind(self.optimizer) or ADAMW
        return ADAMW_8BIT if kind == ADAMW and self.use_8bit_adam else kind

    @property
    def rate(self) -> float:
        """learning_rate, or the optimizer's own."""
        return self.kind.learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def rates(self) -> dict[str, float]:
        """lr_pattern as layer → learning rate.

        Raises:
            ValueError: it cannot be read.
        """
        entries = [entry.partition("=") for entry in self.lr_pattern.split(",")] if self.lr_pattern else []
        rates = {layer.strip(): float(rate) for layer, _, rate in entries}
        if not all(layer and 0 < rate < math.inf for layer, rate in rates.items()):
            raise ValueError(self.lr_pattern)
        return rates

    @property
    def betas(self) -> tuple[float, float] | None:
        """adam_beta1 and adam_beta2, or the optimizer's own; None where it has none."""
        if self.kind.beta1 is None or self.kind.beta2 is None:
            return None
        return (
            self.kind.beta1 if self.adam_beta1 is None else self.adam_beta1,
            self.kind.beta2 if self.adam_beta2 is None else self.adam_beta2,
        )

    @property
    def epsilon(self) -> float | None:
        """adam_epsilon, or the optimizer's own; None where it has none."""
        return self.kind.epsilon if self.adam_epsilon is None else self.adam_epsilon

    def prodigy_options(self) -> dict[str, Any]:
        """What Prodigy alone is told, with diffusers' defaults."""
        return {
            "beta3": self.prodigy_beta3,
            "decouple": self.prodigy_decouple is not False,
            "use_bias_correction": self.prodigy_use_bias_correction is not False,
            "safeguard_warmup": self.prodigy_safeguard_warmup is not False,
        }

    def identity(self) -> dict[str, Any]:
        """Field → what decides the numbers, alike for all ways to ask for the same."""
        beta1, beta2 = self.betas or (None, None)
        is_8bit = self.kind == ADAMW_8BIT
        switches = {
            f"prodigy_{name}": None if value else "no"
            for name, value in self.prodigy_options().items()
            if name != "beta3"
        }
        return {
            **asdict(self),
            "optimizer": ADAMW.name if is_8bit else self.kind.name,
            "use_8bit_adam": is_8bit,
            "learning_rate": self.rate,
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_epsilon": self.epsilon,
            **switches,
        }

    def earlier_spellings(self) -> frozenset[str]:
        """Of the optimizer's name in `identity`: earlier builds noted it as it was typed."""
        return ADAMW_SPELLINGS if self.identity()["optimizer"] == ADAMW.name else frozenset()

    def _misfits(self) -> Iterator[str]:
        """What cannot work together."""
        kind, name = self.kind, f"--optimizer {self.kind.name}"
        if not kind.is_installed:
            yield f"{name} needs {kind.package}, which is not installed: type `pip install {kind.package}`"
        if self.use_8bit_adam and kind != ADAMW_8BIT:
            yield f"--use_8bit_adam is of AdamW, not of {name}: leave one of them out"
        for flag, typed, has in (
            ("adam_beta1", self.adam_beta1, kind.beta1),
            ("adam_beta2", self.adam_beta2, kind.beta2),
            ("adam_epsilon", self.adam_epsilon, kind.epsilon),
        ):
            if typed is not None and has is None:
                yield f"--{flag} does nothing with {name}: leave it out"
        for flag in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup"):
            if getattr(self, f"prodigy_{flag}") is not None and kind != PRODIGY:
                yield f"--prodigy_{flag} does nothing with {name}: leave it out, or type --optimizer prodigy"
        if kind == PRODIGY and self.scale_lr:
            yield f"--scale_lr multiplies a learning rate that {name} finds by itself: leave it out"
        if kind == PRODIGY and self.adam_epsilon == 0:
            yield f"--adam_epsilon must be positive with {name}"
        if kind == SCHEDULE_FREE_ADAMW and self.adam_beta1 == 0:
            yield f"--adam_beta1 must be positive with {name}, which averages by it"
        if kind == SCHEDULE_FREE_ADAMW and self.lr_scheduler not in ("constant", "constant_with_warmup"):
            yield (
                f"--lr_scheduler {self.lr_scheduler} does not go with {name}, which averages in place of a schedule: "
                "type constant or constant_with_warmup"
            )

    def _rate_faults(self) -> Iterator[str]:
        try:
            rates = self.rates
        except ValueError:
            yield f"--lr_pattern {self.lr_pattern} cannot be read: type for example attn=5e-5,ff.net.2.lora_B=1e-3"
            return
        if self.kind == PRODIGY and any(rate != self.rate for rate in rates.values()):
            yield (
                f"--lr_pattern {self.lr_pattern} does not go with --optimizer {self.kind.name}, which finds one "
                "learning rate for all: leave one of them out"
            )

    def _faults(self) -> Iterator[str]:
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            yield "--lr_scheduler piecewise_constant needs --lr_step_rules, for example 1:100,0.1"
        if not (self.rate > 0 and self.max_grad_norm > 0) or self.lr_warmup_steps < 0:
            yield "--learning_rate and --max_grad_norm must be positive, --lr_warmup_steps not negative"
        if not all(0 <= beta < 1 for beta in self.betas or ()):
            yield "--adam_beta1 and --adam_beta2 must be at least 0 and less than 1"
        if self.prodigy_beta3 is not None and not 0 <= self.prodigy_beta3 < 1:
            yield "--prodigy_beta3 must be at least 0 and less than 1"
        if not (self.adam_weight_decay >= 0 and (self.epsilon or 0) >= 0):
            yield "--adam_weight_decay and --adam_epsilon must not be negative"

    def scaled_rate(self, pictures_per_step: int) -> float:
        """The learning rate, multiplied under --scale_lr."""
        return self.rate * (pictures_per_step if self.scale_lr else 1)

    def scaled_rates(self, pictures_per_step: int) -> dict[str, float]:
        """Those of lr_pattern, likewise."""
        return {layer: rate * (pictures_per_step if self.scale_lr else 1) for layer, rate in self.rates.items()}
