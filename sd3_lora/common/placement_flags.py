"""The flags of every trick that saves memory or time: each is the plan's choice (auto), or forced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from sd3_lora.common.command_line import require_right

AskedPrecision = Literal["16bit", "nf4", "auto"]
AttentionKernel = Literal["cudnn", "flash", "efficient", "math"]
StreamSource = Literal["host", "files"]
Switch = Literal["auto", "on", "off"]
_SWITCHES: dict[str, bool | None] = {"auto": None, "on": True, "off": False}


def is_on(switch: str) -> bool | None:
    """Whether a trick is forced on or off; None where the plan chooses."""
    return _SWITCHES[switch]


def wrong_number(flag: str, value: str, least: int) -> str | None:
    """What is wrong with a flag that takes a number or auto; None where nothing is."""
    if value == "auto" or (value.isdecimal() and int(value) >= least):
        return None
    return f"--{flag} {value} is neither auto nor a whole number from {least} on"


def number_or_auto(value: str) -> int | None:
    """The number that a flag has; None for auto."""
    return None if value == "auto" else int(value)


@dataclass(frozen=True)
class BaseFlags:
    """Where the transformer's weights are, and how attention is computed."""

    base_precision: AskedPrecision = field(
        default="16bit",
        metadata={
            "help": "Of the frozen transformer's weights. 16bit is exact (32 bits under --mixed_precision no); nf4 "
            "takes a quarter of it and changes the numbers; auto takes nf4 where 16bit does not fit on the device."
        },
    )
    stream_blocks: str = field(
        default="auto",
        metadata={
            "aliases": ["--blocks_to_swap"],
            "help": "How many blocks' weights are streamed to the device piece by piece, evenly spread over them. "
            "0 keeps all on the device; auto streams as few as fit.",
        },
    )
    stream_from: Literal["auto", "host", "files"] = field(
        default="auto",
        metadata={
            "help": "Where streamed weights are: in pinned host memory, or in the mapped weight files (slower). auto "
            "takes the host where they fit."
        },
    )
    stream_buffers: str = field(
        default="auto", metadata={"help": "Streamed pieces that the device has room for: 2 or more. auto: 6, or fewer."}
    )
    attention_kernel: Literal["auto", "cudnn", "flash", "efficient", "math"] = field(
        default="auto",
        metadata={
            "help": "torch's kernel for attention. They differ in speed and rounding; math keeps every score, and "
            "takes much more memory. auto is torch's choice."
        },
    )

    def __post_init__(self) -> None:
        require_right(
            fault
            for fault in (
                wrong_number("stream_blocks", self.stream_blocks, 0),
                wrong_number("stream_buffers", self.stream_buffers, 2),
            )
            if fault
        )

    @property
    def streamed(self) -> int | None:
        """stream_blocks as a number; None for auto."""
        return number_or_auto(self.stream_blocks)

    @property
    def buffers(self) -> int | None:
        """stream_buffers as a number; None for auto."""
        return number_or_auto(self.stream_buffers)


@dataclass(frozen=True)
class StepFlags:
    """How a training step saves memory and time."""

    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute all blocks, as --recompute_blocks with their number. Without it: as few as fit."},
    )
    recompute_blocks: str = field(
        default="auto",
        metadata={
            "help": "How many blocks, from the first on, recompute their activations in backward. auto: as few as fit; "
            "without a memory budget none."
        },
    )
    offload_inputs: Switch = field(
        default="auto",
        metadata={
            "aliases": ["--cpu_offload_checkpointing"],
            "nargs": "?",
            "const": "on",
            "help": "Offload the recomputed blocks' inputs to the host until backward. auto: where nothing less fits.",
        },
    )
    modulations_ahead: Switch = field(
        default="auto",
        metadata={
            "help": "Compute the modulations of blocks that are streamed and recomputed one micro-step ahead, in "
            "backward, where the link to the host has time. auto: on."
        },
    )
    stream_text_encoders: Switch = field(
        default="auto",
        metadata={
            "help": "Stream the weights of the CLIPs' layers too, where something of the CLIPs is trained. auto: where "
            "streamed blocks alone do not make it fit."
        },
    )
    compile: Literal["auto", "on", "off", "blocks", "graph"] = field(
        default="auto",
        metadata={
            "help": "Compile the transformer's blocks: half a minute once, a quarter less time a step, other "
            "roundings. auto: on a GPU, where the steps to come repay it. (In older commands, blocks is on, and "
            "graph is --compile off --capture on.)"
        },
    )
    capture: Switch = field(
        default="auto",
        metadata={
            "help": "Capture each micro-step as one CUDA graph and replay it: the same kernels, launched at once. "
            "auto: where the run can have it."
        },
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        fault = wrong_number("recompute_blocks", self.recompute_blocks, 0)
        if fault:
            yield fault
        elif self.gradient_checkpointing and self.recompute_blocks != "auto":
            yield (
                f"--gradient_checkpointing recomputes all blocks, and --recompute_blocks {self.recompute_blocks} so "
                "many: leave one out"
            )
        if self.compile == "graph" and self.capture == "off":
            yield "--compile graph captures a CUDA graph, and --capture off does not: leave one out"

    def recomputed(self, blocks: int) -> int | None:
        """How many blocks are to be recomputed of so many; None for auto."""
        return blocks if self.gradient_checkpointing else number_or_auto(self.recompute_blocks)

    @property
    def must_compile(self) -> bool | None:
        """Whether blocks are to be compiled or not; None for auto."""
        older = {"blocks": "on", "graph": "off"}
        return is_on(older.get(self.compile, self.compile))

    @property
    def must_capture(self) -> bool | None:
        """Whether a CUDA graph is to be captured or not; None for auto."""
        return True if self.compile == "graph" else is_on(self.capture)
