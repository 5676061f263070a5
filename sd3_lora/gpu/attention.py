"""Which of torch's kernels computes attention. By default torch chooses, by device, dtype and shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sd3_lora.common.command_line import UserError
from sd3_lora.common.placement_flags import AttentionKernel

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextmanager
def attention_kernel(kernel: AttentionKernel | None) -> Iterator[None]:
    """Has `scaled_dot_product_attention` take this kernel in the block; None leaves the choice to torch.

    Backward takes what forward took, wherever it runs.
    """
    if kernel is None:
        yield
        return
    with sdpa_kernel(_BACKENDS[kernel]):
        yield


def require_attention_kernel(
    kernel: AttentionKernel | None, device: torch.device, dtype: torch.dtype, head_width: int, trains: bool = False
) -> None:
    """Tries the kernel on a few numbers, forward and, to train, backward.

    Args:
        kernel: `--attention_kernel`; None is always there.
        device: that computes.
        dtype: of queries, keys and values.
        head_width: of one attention head.
        trains: whether backward is needed too.

    Raises:
        UserError: it does not run here.
    """
    if kernel is None:
        return
    query, key, value = (
        torch.zeros(1, 1, 16, head_width, dtype=dtype, device=device, requires_grad=trains) for _ in range(3)
    )
    try:
        with attention_kernel(kernel):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        if trains:
            out.sum().backward()
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(
            f"--attention_kernel {kernel} does not run on {name} in {str(dtype).removeprefix('torch.')}: leave it out"
        ) from error
