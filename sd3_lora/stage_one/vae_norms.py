"""The VAE's group norms on a GPU, spread over all of it.

torch sums each group of channels in one block of threads. A picture has 32 groups, an H100 132 multiprocessors: at
1024 px the norms took half of the encoder's time. Here every channel is summed by itself, by what synchronized batch
norm is made of, and groups are put together of their channels. A layout with channels last is kept as it is.
"""

from __future__ import annotations

from functools import partial

import torch


def arrange_vae(vae: torch.nn.Module) -> None:
    """Has a VAE compute as is fast where it is: on a GPU with channels last in memory, its norms spread.

    That is the layout of tensor cores: cuDNN would turn every feature map into it and back, and torch's own norms back
    and into it. Only for inference.
    """
    if next(vae.parameters()).is_cuda:
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        spread_group_norms(vae)


def spread_group_norms(vae: torch.nn.Module) -> None:
    """Has the group norms of a VAE on a GPU computed so; on a CPU nothing changes. Only for inference.

    The numbers differ by the rounding of float32 sums.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            words = module.num_groups, module.eps, module.weight, module.bias
            module.forward = partial(_group_norm, *words)  # type: ignore[method-assign]


def _group_norm(groups: int, eps: float, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As `torch.nn.functional.group_norm` of `(B, C, ...)`."""
    if x.device.type != "cuda":
        return torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    out = torch.empty_like(x)
    for index in range(len(x)):
        one = x[index : index + 1]
        mean, inverse = torch.batch_norm_stats(one, 0.0)  # (C,) float32; the inverse of the standard deviation
        within = inverse.pow(-2).view(groups, -1).mean(1)
        between, of_group = torch.var_mean(mean.view(groups, -1), 1, correction=0)
        numbers = torch.stack([of_group, (within + between + eps).rsqrt()])  # (2, groups)
        mean, inverse = numbers.repeat_interleave(len(mean) // groups, dim=1)
        torch.batch_norm_elemt(one, weight, bias, mean, inverse, eps, out=out[index : index + 1])
    return out
