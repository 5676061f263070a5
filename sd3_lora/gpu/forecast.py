"""What a piece of work is expected to take: bytes by part, in each of its phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sd3_lora.gpu.budget import sentence


@dataclass(frozen=True)
class Phase:
    """A time in which the same things are in the device's memory, such as a training step or a picture's decoding.

    Attributes:
        name: of the phase.
        parts: bytes by what takes them, both what stays and what works: weights, activations.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    def sentence(self) -> str:
        """The parts and their sum: "weights 3.91 + activations 0.60 = 4.51 GiB"."""
        return sentence(self.parts)


@dataclass(frozen=True)
class Forecast:
    """The memory that a stage is expected to take.

    Attributes:
        phases: in their order. The peak is that of the largest.
        host_bytes: of pinned host memory.
        has_room_for_graph: whether the peak includes what capturing a training step as a CUDA graph takes; else the
            step may be captured or not.
    """

    phases: tuple[Phase, ...] = ()
    host_bytes: int = 0
    has_room_for_graph: bool = True

    @property
    def largest(self) -> Phase:
        """The phase with the peak; an empty one where there is no phase."""
        return max(self.phases, key=lambda phase: phase.peak_bytes, default=Phase("", {}))

    @property
    def peak_bytes(self) -> int:
        """Of the largest phase; 0 where nothing was forecast."""
        return self.largest.peak_bytes
