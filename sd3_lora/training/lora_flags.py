"""The flags of the LoRA: its shape, its start and its moving average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sd3_lora.common.command_line import less_than_one, require_right
from sd3_lora.common.config import LoraStart, LoraType


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
        metadata={
            "help": "Comma-separated layers, such as attn.to_k,attn.to_q, or presets: attention, attention+mlp, "
            "second_attention (of SD3.5-Medium). Default: all of joint attention."
        },
    )
    lora_blocks: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated indices of transformer blocks, such as 12,13, or presets: early (the first half), "
            "late (the rest). Default: all."
        },
    )
    rank_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Ranks of single layers, such as attn.to_q=8,ff.net.2=16; the first that fits counts. Their alpha "
            "is in proportion."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the update by alpha / sqrt(rank) (rsLoRA), not alpha / rank."}
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "Train the magnitudes of the layers' outputs too (DoRA); not with streamed blocks."},
    )
    init_lora_weights: LoraStart = field(
        default="gaussian",
        metadata={
            "help": "gaussian (as diffusers) and default (as PEFT) start from nothing; pissa and olora from the "
            "largest part of the weights, and save twice the rank."
        },
    )
    lora_type: LoraType = field(
        default="lora",
        metadata={"help": "lora, or LyCORIS' lokr and loha, whose file ComfyUI and inference.py read."},
    )
    lokr_factor: int = field(
        default=-1,
        metadata={
            "help": "Rows and columns of a LoKr's first matrix; the larger, the fewer numbers. -1 is about the square "
            "root of the layer's."
        },
    )
    init_lora: str | None = field(
        default=None,
        metadata={"help": "Start from this LoRA: a folder, file or hub id, of this or another program."},
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(self, "rank")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            yield "--lora_alpha must be positive"
        if not 0 <= self.lora_dropout < 1:
            yield "--lora_dropout must be at least 0 and less than 1"
        if self.init_lora_weights in ("pissa", "olora"):
            start = f"--init_lora_weights {self.init_lora_weights}"
            if self.use_dora:
                yield f"{start} and --use_dora are two kinds of LoRA: leave one out"
            if self.init_lora is not None:
                yield f"{start} and --init_lora are two ways to start: leave one out"
            if self.lora_dropout:
                yield f"{start} and --lora_dropout: it would drop a part of the model itself: leave one out"
        yield from self._type_faults()
        for entry in self._split(self.rank_pattern) or ():
            layer, _, rank = entry.partition("=")
            if not layer.strip() or not rank.strip().isdecimal() or int(rank) < 1:
                yield f"--rank_pattern {self.rank_pattern} cannot be read: type for example attn.to_q=8,ff.net.2=16"

    def _type_faults(self) -> Iterator[str]:
        if self.lokr_factor != -1 and self.lokr_factor < 1:
            yield f"--lokr_factor {self.lokr_factor} must be at least 1, or -1 for about the square root"
        if self.lokr_factor != -1 and self.lora_type != "lokr":
            yield f"--lokr_factor {self.lokr_factor} is of --lora_type lokr: add that, or leave it out"
        if self.lora_type == "lora":
            return
        of_plain_lora = {
            "--use_dora": self.use_dora,
            "--use_rslora": self.use_rslora,
            f"--init_lora_weights {self.init_lora_weights}": self.init_lora_weights != "gaussian",
            f"--lora_dropout {self.lora_dropout:g}": self.lora_dropout > 0,
        }
        for flag, typed in of_plain_lora.items():
            if typed:
                yield f"{flag} is of a plain LoRA, not of --lora_type {self.lora_type}: leave one out"

    @property
    def alpha(self) -> float:
        """lora_alpha, or the rank."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def layers(self) -> list[str] | None:
        """lora_layers as a list."""
        return self._split(self.lora_layers)

    @property
    def blocks(self) -> list[str] | None:
        """lora_blocks as a list of indices and presets."""
        return self._split(self.lora_blocks)

    @property
    def ranks(self) -> dict[str, int]:
        """rank_pattern as layer → rank."""
        entries = (entry.partition("=") for entry in self._split(self.rank_pattern) or ())
        return {layer.strip(): int(rank) for layer, _, rank in entries}

    @staticmethod
    def _split(words: str | None) -> list[str] | None:
        return [word.strip() for word in words.split(",")] if words else None


@dataclass(frozen=True)
class AverageFlags:
    """The moving average of the LoRA."""

    use_ema: bool = field(
        default=False,
        metadata={"help": "Keep an exponential moving average of the LoRA too, and write it beside the LoRA."},
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "The largest decay of that average; step n has at most (1 + n) / (10 + n)."},
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not 0 <= self.ema_decay < 1:
            yield f"--ema_decay {self.ema_decay:g} must be at least 0 and less than 1: 0.9999 is usual"
        elif self.ema_decay != AverageFlags.ema_decay and not self.use_ema:
            yield f"--ema_decay {self.ema_decay:g} is of --use_ema: add that, or leave it out"
