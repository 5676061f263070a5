"""What is trained, in named groups: each has one flat parameter and a learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.flat_parameters import flatten_parameters

import torch


@dataclass(frozen=True)
class TrainedGroup:
    """Parameters that are updated alike.

    Attributes:
        name: of what they belong to, such as "transformer".
        flat: all of them as one float32 tensor, with its gradient (`flatten_parameters`).
        learning_rate: at the schedule's full rate.
        parts: the parameters themselves, whose data and gradients are views of `flat`.
        weight_decay: of it; None for the optimizer's.
        first_step: the optimizer step that changes it first.
        last_step: the one that changes it last; None for the run's.
    """

    name: str
    flat: torch.nn.Parameter
    learning_rate: float
    parts: tuple[torch.nn.Parameter, ...] = ()
    weight_decay: float | None = None
    first_step: int = 1
    last_step: int | None = None

    def trains_at(self, step: int) -> bool:
        """Whether an optimizer step changes it."""
        return self.first_step <= step and (self.last_step is None or step <= self.last_step)

    @property
    def is_for_a_time(self) -> bool:
        """Whether not every step changes it."""
        return self.first_step > 1 or self.last_step is not None

    @property
    def gradient(self) -> torch.Tensor:
        """To which backward adds."""
        if self.flat.grad is None:
            raise ValueError(f"the group {self.name} has no gradient: flatten its parameters first")
        return self.flat.grad


def pattern_of(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern whose names stand in a row in a dotted name: attn and to_q.lora_A fit attn.to_q.lora_A."""
    return next((pattern for pattern in patterns if f".{pattern}." in f".{name}."), None)


def require_patterns(rates: Mapping[str, float], names: Iterable[str]) -> None:
    """Checks that each pattern of `--lr_pattern` is of something that is trained.

    Args:
        rates: pattern → learning rate.
        names: of the trained parts inside their blocks, such as attn.to_q.lora_A.

    Raises:
        UserError: one is of nothing, or only of what an earlier one has.
    """
    known = sorted(set(names))
    chosen = {pattern_of(name, rates) for name in known}
    for pattern, rate in rates.items():
        if pattern not in chosen:
            fits = any(pattern_of(name, [pattern]) for name in known)
            reason = "patterns before it have all that it fits" if fits else f"what is trained is {', '.join(known)}"
            raise UserError(f"--lr_pattern {pattern}={rate:g}: {reason}")


def groups_by_rate(group: TrainedGroup, names: Sequence[str], rates: Mapping[str, float]) -> list[TrainedGroup]:
    """A group, cut into one for each pattern of names, with its learning rate; what no pattern fits comes first.

    Args:
        group: with its parts. Where there are patterns, its flat parameter is not to be used afterwards.
        names: of the parts, inside their blocks.
        rates: pattern → learning rate; the first that fits counts.
    """
    if not rates:
        return [group]
    chosen = [pattern_of(name, rates) for name in names]
    groups = []
    for pattern in (None, *rates):
        rate = group.learning_rate if pattern is None else rates[pattern]
        parts = tuple(part for part, own in zip(group.parts, chosen, strict=True) if own == pattern)
        if parts:
            name = f"{group.name} {pattern}" if pattern else group.name
            flat = flatten_parameters(parts)
            groups.append(replace(group, name=name, flat=flat, learning_rate=rate, parts=parts))
    return groups


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
            {
                "params": list(group.parts) if as_matrices else [group.flat],
                "lr": group.learning_rate,
                **({} if group.weight_decay is None else {"weight_decay": group.weight_decay}),
            }
            for group in self.groups
        ]

    def reduce(self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces each gradient by its mean over the processes."""
        for gradient in self.gradients:
            gradient.copy_(mean_over_ranks(gradient))

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clips the gradients of all groups together; their norm before that, a float32 scalar on the device."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
