"""What the modulations of a checkpointed block gave in forward, kept for when backward computes the block anew.

A modulation multiplies one row a picture with the largest matrix of a block: a third of SD3-Medium's block, to make
18 KB a picture. Where the matrix has to be copied to the device first, it is cheaper to keep the result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any

import torch

_current: ContextVar[dict[Hashable, torch.Tensor] | None] = ContextVar("kept modulations", default=None)


class KeptModulations:
    """Those of one run of a block: in force while it runs for the first time, and when it is run again."""

    def __init__(self) -> None:
        self._results: dict[Hashable, torch.Tensor] = {}

    def run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """What the block gives."""
        token = _current.set(self._results)
        try:
            return block(*inputs)
        finally:
            _current.reset(token)


def kept_or_computed(layer: Hashable, x: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a layer gave in the first of two runs, if this is the second; else what it computes.

    Args:
        layer: that asks, once a run.
        x: its input: `(B, C)`. Of another number of dimensions, or where it has a gradient, nothing is kept.
        compute: gives what it gives.
    """
    results = _current.get()
    if results is None or x.dim() != 2 or x.requires_grad:
        return compute()
    if layer not in results:
        results[layer] = compute()
    return results[layer]
