"""Attention whose backward pass gives the same bits in every call.

Of a training step on a GPU nothing else differs from call to call: torch's fused kernels sum the queries' gradient in
the order in which thread blocks happen to end. The forward pass stays torch's own.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sd3_lora.common.devices import has_triton
from sd3_lora.common.placement_flags import AttentionKernel

import torch
from torch.nn.functional import pad

_WIDTHS = (16, 32, 64)  # of a head, in Triton
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AttentionBackward(enum.Enum):
    """What computes attention's backward pass."""

    TORCH = "torch's"  # the fastest that torch has; its last bits may differ from call to call
    TRITON = "Triton"  # as fast
    FLASH = "flash attention, exact"  # slower
    CHUNKS = "memory-efficient attention, by chunks of queries"  # for cards before Ampere; slower

    @property
    def is_exact(self) -> bool:
        """Whether it gives the same bits in every call. On a CPU torch's does too."""
        return self is not AttentionBackward.TORCH


def choose_backward(
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    kernel: AttentionKernel | None,
    deterministic: bool | None = None,
) -> AttentionBackward:
    """By default Triton's where it runs, since it is as fast as the fastest of torch's; else torch's.

    Args:
        device: that computes.
        dtype: of queries, keys and values.
        head_width: of one attention head.
        kernel: `--attention_kernel`: the backward pass of math is exact as it is.
        deterministic: `--deterministic`: True wants exactness also where it is slower, False torch's kernels.
    """
    if device.type != "cuda" or kernel == "math" or deterministic is False:
        return AttentionBackward.TORCH
    is_ampere = torch.cuda.get_device_capability(device) >= (8, 0) and dtype != torch.float32
    if is_ampere and head_width in _WIDTHS and _triton_runs(device, dtype, head_width):
        return AttentionBackward.TRITON
    if deterministic is None:
        return AttentionBackward.TORCH
    return AttentionBackward.FLASH if is_ampere else AttentionBackward.CHUNKS


def _triton_runs(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether its kernels can be compiled and started here: without a C compiler, for one, they cannot."""
    if not has_triton():
        return False
    few = torch.zeros(1, 1, 16, head_width, dtype=dtype, device=device)
    try:
        _in_triton(few, few, few, few, few, few.new_zeros(1, 1, 16, dtype=torch.float32), 1.0, (few, few, few))
        torch.cuda.synchronize(device)
    except Exception:  # of any library that it calls
        return False
    return True


@contextmanager
def exact_attention(backward: AttentionBackward) -> Iterator[None]:
    """Replaces the backward pass of torch's fused attention kernels in the block, for the whole process.

    What autograd, a compiled block or a captured graph calls is replaced where torch looks it up, so that none of them
    need know. Masks, causal attention and dropout are refused: the transformer has none.
    """
    compute = _COMPUTE.get(backward)
    if compute is None:
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
        for name, make in (("cudnn", _of_cudnn), ("flash", _of_flash), ("efficient", _of_efficient)):
            library.impl(f"_scaled_dot_product_{name}_attention_backward", make(compute), "CUDA")
    try:
        yield
    finally:
        library._destroy()


Compute = Callable[..., None]


def _of_cudnn(compute: Compute) -> Callable[..., Grads]:
    def backward(
        grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, seed: Any, offset: Any, bias: torch.Tensor | None, cum_q: Any, cum_k: Any,
        max_q: int, max_k: int, dropout: float, is_causal: bool, *, scale: float | None = None,
    ) -> Grads:  # fmt: skip
        _require_plain(bias, dropout, is_causal)
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        compute(grad, query, key, value, out, lse.flatten(2), scale or query.shape[-1] ** -0.5, grads)
        return grads

    return backward


def _of_flash(compute: Compute) -> Callable[..., Grads]:
    def backward(
        grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, cum_q: Any, cum_k: Any, max_q: int, max_k: int,
        dropout: float, is_causal: bool, seed: Any, offset: Any, *, scale: float | None = None,
    ) -> Grads:  # fmt: skip
        _require_plain(None, dropout, is_causal)
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        compute(grad, query, key, value, out, lse, scale or query.shape[-1] ** -0.5, grads)
        return grads

    return backward


def _of_efficient(compute: Compute) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]]:
    def backward(
        grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None,
        out: torch.Tensor, lse: torch.Tensor, seed: Any, offset: Any, dropout: float, wanted: list[bool],
        is_causal: bool = False, *, scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:  # fmt: skip
        _require_plain(bias, dropout, is_causal)
        # Compiled code counts on this kernel's order in memory: (batch, tokens, heads, width).
        grads = tuple(torch.empty_like(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in (query, key, value))
        compute(grad, query, key, value, out, lse, scale or query.shape[-1] ** -0.5, grads)
        return (*grads, None)  # type: ignore[return-value]

    return backward


def _require_plain(bias: torch.Tensor | None, dropout: float, is_causal: bool) -> None:
    if bias is not None or dropout or is_causal:
        raise NotImplementedError("attention with a mask, dropout or causal order has no exact backward pass here")


def _in_triton(*arguments: Any) -> None:
    from sd3_lora.gpu.triton_attention import attention_backward

    attention_backward(*arguments)


def _in_flash(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, scale: float, grads: Grads,
) -> None:  # fmt: skip
    """Flash attention keeps a sum of the queries' gradient for each share of the keys, and adds them in one order."""
    transposed = [t.transpose(1, 2) for t in (grad, query, key, value, out)]
    none = torch.empty(0, dtype=torch.int64, device=query.device)
    sums = lse[:, :, : query.shape[2]].contiguous()
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        computed = torch.ops.aten._flash_attention_backward(
            *transposed, sums, None, None, query.shape[2], key.shape[2], 0.0, False, none, none, scale=scale
        )
    finally:
        torch.use_deterministic_algorithms(was_on)
    for place, tensor in zip(grads, computed, strict=True):
        place.copy_(tensor.transpose(1, 2))


def scratch_bytes(backward: AttentionBackward, query: torch.Tensor, key: torch.Tensor) -> int:
    """What a backward pass allocates beside the gradients, for queries and keys of (batch, heads, tokens, width)."""
    batch, heads, queries, width = query.shape
    row, item = batch * heads * queries, query.element_size()
    if backward is AttentionBackward.TORCH:
        return 4 * row * (width + 1)  # the queries' gradient in float32
    if backward is AttentionBackward.TRITON:
        return 8 * row
    if backward is AttentionBackward.FLASH:
        shares = -(-_processors() // (batch * heads))
        return 4 * row * (width * shares + 1) + item * width * batch * heads * (queries + 2 * key.shape[2])
    count, row = chunk_count(heads, queries, _processors()), row // batch  # one picture at a time
    copies = row * (width * (4 * item + 4) + 4)
    return copies + heads * key.shape[2] * width * (2 * count * item + 4)


def _processors() -> int:
    """The GPU's multiprocessors; a T4's where there is none."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 40


def chunk_count(heads: int, queries: int, processors: int) -> int:
    """How many chunks of queries keep a GPU's multiprocessors busy with one thread block for each chunk and head."""
    return max(1, min(-(-2 * processors // heads), queries // 64))


def _in_chunks(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, scale: float, grads: Grads,
) -> None:  # fmt: skip
    """The memory-efficient kernel with all keys of a head in one thread block: exact, and slow for want of blocks.

    So queries are cut into chunks, one thread block each; the keys' and values' gradients of all chunks are added up.
    """
    batch, heads, queries, width = query.shape
    count = chunk_count(heads, queries, _processors())
    size = -(-queries // count)
    past = count * size - queries
    none = torch.empty((), dtype=torch.int64, device=query.device)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        """(heads, queries, width) → (count, size, heads, width), with zeros past the end."""
        return pad(tensor.transpose(0, 1), (0, 0, 0, 0, 0, past)).reshape(count, size, heads, width).contiguous()

    for picture in range(batch):
        sums = pad(lse[picture, :, :queries], (0, past), value=float("inf")).reshape(heads, count, size).transpose(0, 1)
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            cut(grad[picture]), cut(query[picture]),
            *(t[picture].transpose(0, 1).expand(count, -1, -1, -1) for t in (key, value)), None, cut(out[picture]),
            None, None, size, key.shape[2], pad(sums, (0, -size % 32)).contiguous(), 0.0, none, none, 0, False,
            scale=scale, num_splits_key=1,
        )  # fmt: skip
        grads[0][picture].copy_(dq.reshape(count * size, heads, width)[:queries].transpose(0, 1))
        for place, parts in zip(grads[1:], (dk, dv), strict=True):
            place[picture].copy_(parts.sum(0, dtype=torch.float32).transpose(0, 1))


_COMPUTE: dict[AttentionBackward, Compute] = {
    AttentionBackward.TRITON: _in_triton,
    AttentionBackward.FLASH: _in_flash,
    AttentionBackward.CHUNKS: _in_chunks,
}
