"""The averaged weights of schedule-free AdamW (Defazio et al., arXiv 2405.15682), to save and to draw with.

The gradient is taken at y, between the average x and the weights z that the steps move: y = beta1 x + (1 - beta1) z.
The parameters are y. `optimizer.eval()` and `.train()` turn them into x and back, and round them: a run that saved
would not be the run that did not. So x is computed here, and y is kept meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In the block the parameters are the average, and after it the very bits that they were.

    Does nothing to another optimizer's parameters, nor before the first step.

    Args:
        optimizer: that trains them; its parameters are written where they lie, so that views see the average too.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group.get("train_mode") else ():
                z = optimizer.state.get(parameter, {}).get("z")
                if z is not None:
                    kept.append((parameter.data, parameter.detach().to("cpu", copy=True)))
                    parameter.data.lerp_(z, 1 - 1 / group["betas"][0])
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)
