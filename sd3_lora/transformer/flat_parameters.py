"""Parameters as one tensor: hundreds of small ones would need hundreds of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def flatten_parameters(parameters: Sequence[torch.nn.Parameter]) -> torch.nn.Parameter:
    """One parameter with the memory of all, and its gradient with that of theirs.

    A LoRA is hundreds of small tensors: as one, it is unscaled, measured, clipped, updated, cleared and exchanged
    between processes by a kernel each. The update is elementwise, so its numbers are the same (8-bit states have their
    blocks of 256 cut in other places).

    Args:
        parameters: all of one dtype and device, without gradients yet. Their data and gradients become views, so that
            neither may be replaced afterwards, only written.
    """
    flat = torch.nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, gradient in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data = data.view_as(parameter)
        parameter.grad = gradient.view_as(parameter)
    return flat
