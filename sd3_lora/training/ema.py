"""The exponential moving average (EMA) of what is trained, kept beside it on the device.

The averages of lora_A and lora_B, multiplied, are not the average of their product, but near it while steps are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sd3_lora.training.trainables import Trainables

import torch

EMA_BYTES_PER_PARAMETER = 4


class MovingAverage:
    """The average of all groups of trainables, in float32.

    Update n, from 0, makes it `d * average + (1 - d) * parameters`, with `d = min(decay, (1 + n) / (10 + n))`: the
    warm-up of diffusers' EMAModel. While that is in force (with a decay of 0.9999, for 90,000 steps), the average is
    over about the last ninth of the steps.

    Steps that the gradient scaler skipped do not count. The device decides that, so the host waits for nothing.

    Args:
        trainables: whose parameters are averaged, from what they are now.
        decay: the largest, at least 0 and less than 1.
    """

    def __init__(self, trainables: Trainables, decay: float):
        self._parameters = trainables.parameters
        self._decay = decay
        self._averages = [parameter.detach().clone() for parameter in self._parameters]
        self._updates = torch.zeros((), device=self._averages[0].device)  # float32 counts exactly to 16 million

    @torch.no_grad()
    def update(self, gradient_norm: torch.Tensor) -> None:
        """Takes in the parameters after an optimizer step.

        Args:
            gradient_norm: of the step, a scalar on the device. Where it is not finite, the step was skipped.
        """
        counts = gradient_norm.isfinite()
        decay = ((1 + self._updates) / (10 + self._updates)).clamp(max=self._decay)
        share = (1 - decay) * counts
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter, share)
        self._updates += counts

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The averages, which only `update` and `in_place` need."""
        return self._averages

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the averages are in the parameters' place, to save or to draw with them.

        The parameters are kept on the host meanwhile, and come back bit for bit.
        """
        trained = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(trained)

    def _write(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averages, and how many steps were counted."""
        return {"averages": list(self._averages), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
        self._updates.copy_(state["updates"])
