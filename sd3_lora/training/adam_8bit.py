"""AdamW with its state in 8 bits (Dettmers et al., arXiv 2110.02861), and without a host–device synchronisation.

bitsandbytes synchronises after every step; and GradScaler does before it, to learn whether the step is to be skipped.
The device is then idle until the host has queued the next step. Importing this takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd3_lora.gpu.copy_stream import DeviceFlag

import bitsandbytes
import torch


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW8bit, bit for bit; but a step whose gradient was infinite is undone on the device.

    The host counts the steps, for Adam's bias correction. It reads whether the last one was skipped when the next one
    is queued: by then the flag has arrived, and the device computes the next gradient.

    bitsandbytes starts its kernels on the default stream. So must be what makes the gradient.

    Args:
        parameters: in float32, or torch's groups of them.
        options: of `bitsandbytes.optim.AdamW8bit`.
    """

    # GradScaler then does not synchronise, but sets `found_inf`: a float32 scalar, not 0 where a gradient was infinite.
    _step_supports_amp_scaling = True

    def __init__(self, parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]], **options: Any):
        super().__init__(parameters, **options)
        self._was_skipped: DeviceFlag | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter, whose gradient must be there."""
        self._count_last_step()
        found_inf = getattr(self, "found_inf", None)  # None without a scaler
        skipped: Any = None if found_inf is None else found_inf.bool()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                if not state:
                    self.init_state(group, parameter, group_index, index)
                before = []
                if skipped is not None:
                    changed = [state[name] for name in state if name.startswith(("state", "absmax"))]
                    before = [(tensor, tensor.clone()) for tensor in (parameter.data, *changed)]
                self.update_step(group, parameter, group_index, index)
                for tensor, old in before:
                    torch.where(skipped, old, tensor, out=tensor)
        if skipped is not None:
            self._was_skipped = DeviceFlag.of(skipped)

    def state_dict(self) -> dict[str, Any]:
        """The state, with the steps that counted."""
        self._count_last_step()
        return super().state_dict()

    def _count_last_step(self) -> None:
        if self._was_skipped:
            for state in self.state.values():
                state["step"] -= 1
        self._was_skipped = None
