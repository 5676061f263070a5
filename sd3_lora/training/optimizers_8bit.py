"""bitsandbytes' optimizers, whose state is in 8 bits (Dettmers et al., arXiv 2110.02861).

bitsandbytes synchronises host and device after every step; and GradScaler does before it, to learn whether the step is
to be skipped. The device is then idle until the host has queued the next step. Those here do neither, but for the paged
one. Importing this takes seconds.
"""

from __future__ import annotations

from typing import Any

from sd3_lora.gpu.copy_stream import DeviceFlag

import bitsandbytes
import torch
from bitsandbytes.functional import get_paged
from bitsandbytes.optim.optimizer import Optimizer8bit


class Unsynchronised(Optimizer8bit):
    """A step with bitsandbytes' numbers, bit for bit; but one whose gradient was infinite is undone on the device.

    The host counts the steps, for the bias correction. It reads whether the last one was skipped when the next one is
    queued: by then the flag has arrived, and the device computes the next gradient.

    bitsandbytes starts its kernels on the default stream. So must be what makes the gradient.
    """

    # GradScaler then does not synchronise, but sets `found_inf`: a float32 scalar, not 0 where a gradient was infinite.
    _step_supports_amp_scaling = True
    _was_skipped: DeviceFlag | None = None

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


class AdamW8bit(Unsynchronised, bitsandbytes.optim.AdamW8bit):
    """`bitsandbytes.optim.AdamW8bit`, of float32 parameters or torch's groups of them."""


class AdEMAMix8bit(Unsynchronised, bitsandbytes.optim.AdEMAMix8bit):
    """`bitsandbytes.optim.AdEMAMix8bit` (Pagliardini et al., arXiv 2409.03137): a second, slower first moment."""


class Lion8bit(Unsynchronised, bitsandbytes.optim.Lion8bit):
    """`bitsandbytes.optim.Lion8bit` (Chen et al., arXiv 2302.06675): the sign of one moment."""


class PagedAdamW8bit(bitsandbytes.optim.PagedAdamW8bit):
    """bitsandbytes' own, whose state the driver moves to the host while the device is short of memory.

    Its step synchronises host and device. For a GPU: on a CPU nothing is paged.
    """

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Goes on with paged state: bitsandbytes would leave what it loads on the device."""
        super().load_state_dict(state_dict, move_to_device)
        for parameter, state in self.state.items():
            for name in ("state1", "state2"):
                if parameter.is_cuda and name in state and parameter.numel() >= 1e5:  # as `get_state_buffer` has it
                    paged = get_paged(*parameter.shape, dtype=state[name].dtype, device=parameter.device)
                    paged.copy_(state[name])
                    self.page_mng.paged_tensors.append(paged)
                    state[name] = paged
