"""What is trained, in named groups: each has one flat parameter and a learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TrainedGroup:
    """Parameters that are updated alike.

    Attributes:
        name: of what they belong to, such as "transformer".
        flat: all of them as one float32 tensor, with its gradient (`flatten_parameters`).
        learning_rate: at the schedule's full rate.
        parts: the parameters themselves, whose data and gradients are views of `flat`.
    """

    name: str
    flat: torch.nn.Parameter
    learning_rate: float
    parts: tuple[torch.nn.Parameter, ...] = ()

    @property
    def gradient(self) -> torch.Tensor:
        """To which backward adds."""
        if self.flat.grad is None:
            raise ValueError(f"the group {self.name} has no gradient: flatten its parameters first")
        return self.flat.grad


class Trainables:
    """All groups.

    Args:
        groups: with distinct names.
    """

    def __init__(self, groups: Sequence[TrainedGroup]):
        self.groups = tuple(groups)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """One flat parameter a group."""
        return [group.flat for group in self.groups]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The gradient of each."""
        return [group.gradient for group in self.groups]

    @property
    def numel(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def for_optimizer(self, as_matrices: bool = False) -> list[dict[str, Any]]:
        """Torch's parameter groups.

        Args:
            as_matrices: whether the optimizer is given the parts, in their shapes, instead of all as one.
        """
        return [
            {"params": list(group.parts) if as_matrices else [group.flat], "lr": group.learning_rate}
            for group in self.groups
        ]

    def reduce(self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces each gradient by its mean over the processes."""
        for gradient in self.gradients:
            gradient.copy_(mean_over_ranks(gradient))

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clips the gradients of all groups together; their norm before that, a float32 scalar on the device."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
