"""Attention's backward pass in Triton, whose sums have one order: the same bits in every call.

torch's fused kernels (cuDNN, flash, memory-efficient) share the keys out among thread blocks, and each adds its part of
a query's gradient to memory when it gets there. So that gradient differs from call to call in its last bits. Here one
thread block sums each row of each gradient from beginning to end. It takes seven matrix products where five would do:
scores and their gradients are computed twice, once for the queries' gradient and once for that of keys and values.

Importing this file needs Triton. Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634  # exp2 is one instruction
# A tile of 64 queries and 64 keys, of 13 to 24 that were tried for each kernel on an H100 with heads of 64 channels;
# it takes 66 KiB of shared memory, which all GPUs since Ampere have.
_TILE = 64
_LAUNCH = {"num_warps": 4, "num_stages": 3}
_ROWS = 128  # of `_softmax_sums`


@triton.jit
def _softmax_sums(out_at, grad_at, lse_at, sums_at, o_b, o_h, o_t, g_b, g_h, g_t, l_b, l_h, heads, queries, padded,
                  LOG2_E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """For each query, log2 of softmax's denominator, and what its backward takes off: the sum of output times gradient.

    Past the last query they are infinity and 0, so that a probability there is 0.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    both = tl.program_id(1).to(tl.int64)  # batch and head
    b, h = both // heads, both % heads
    inside = row < queries
    out = tl.load(out_at + b * o_b + h * o_h + row[:, None] * o_t + column, mask=inside[:, None], other=0.0)
    grad = tl.load(grad_at + b * g_b + h * g_h + row[:, None] * g_t + column, mask=inside[:, None], other=0.0)
    lse = tl.load(lse_at + b * l_b + h * l_h + row, mask=inside, other=float("inf"))
    sums_at += both * 2 * padded + row
    tl.store(sums_at, lse * LOG2_E)
    tl.store(sums_at + padded, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1))


@triton.jit
def _grads_of_keys(query_at, key_at, value_at, grad_at, sums_at, dk_at, dv_at,
                   q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
                   heads, queries, keys, padded, scale, scale_log2,
                   WIDTH: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Of TILE keys and values, summed over all queries."""
    both, column = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    b, h = both // heads, both % heads
    n, m = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, TILE)
    is_key = n[:, None] < keys
    key = tl.load(key_at + b * k_b + h * k_h + n[:, None] * k_t + column, mask=is_key, other=0.0)
    value = tl.load(value_at + b * v_b + h * v_h + n[:, None] * v_t + column, mask=is_key, other=0.0)
    query_at += b * q_b + h * q_h
    grad_at += b * g_b + h * g_h
    sums_at += both * 2 * padded
    query_tile = m[:, None] * q_t + column
    grad_tile = m[:, None] * g_t + column
    dk = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    dv = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for start in range(0, queries, TILE):
        is_query = m[:, None] < queries - start
        query = tl.load(query_at + query_tile, mask=is_query, other=0.0)
        grad = tl.load(grad_at + grad_tile, mask=is_query, other=0.0)
        lse = tl.load(sums_at + m)
        sums = tl.load(sums_at + padded + m)
        probability = tl.math.exp2(tl.dot(key, tl.trans(query)) * scale_log2 - lse[None, :])
        dv = tl.dot(probability.to(grad.dtype), grad, dv)
        dscore = probability * (tl.dot(value, tl.trans(grad)) - sums[None, :])
        dk = tl.dot(dscore.to(query.dtype), query, dk)
        query_at += TILE * q_t
        grad_at += TILE * g_t
        sums_at += TILE
    dk_at += b * dk_b + h * dk_h + n[:, None] * dk_t + column
    dv_at += b * dv_b + h * dv_h + n[:, None] * dv_t + column
    tl.store(dk_at, (dk * scale).to(dk_at.dtype.element_ty), mask=is_key)
    tl.store(dv_at, dv.to(dv_at.dtype.element_ty), mask=is_key)


@triton.jit
def _grad_of_queries(query_at, key_at, value_at, grad_at, sums_at, dq_at,
                     q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dq_b, dq_h, dq_t,
                     heads, queries, keys, padded, scale, scale_log2,
                     WIDTH: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Of TILE queries, summed over all keys. A key past the last is zero, and so adds nothing."""
    both, column = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    b, h = both // heads, both % heads
    m, n = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, TILE)
    is_query = m[:, None] < queries
    query = tl.load(query_at + b * q_b + h * q_h + m[:, None] * q_t + column, mask=is_query, other=0.0)
    grad = tl.load(grad_at + b * g_b + h * g_h + m[:, None] * g_t + column, mask=is_query, other=0.0)
    lse = tl.load(sums_at + both * 2 * padded + m)
    sums = tl.load(sums_at + both * 2 * padded + padded + m)
    key_at += b * k_b + h * k_h
    value_at += b * v_b + h * v_h
    key_tile = n[:, None] * k_t + column
    value_tile = n[:, None] * v_t + column
    dq = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for start in range(0, keys, TILE):
        is_key = n[:, None] < keys - start
        key = tl.load(key_at + key_tile, mask=is_key, other=0.0)
        value = tl.load(value_at + value_tile, mask=is_key, other=0.0)
        probability = tl.math.exp2(tl.dot(query, tl.trans(key)) * scale_log2 - lse[:, None])
        dscore = probability * (tl.dot(grad, tl.trans(value)) - sums[:, None])
        dq = tl.dot(dscore.to(key.dtype), key, dq)
        key_at += TILE * k_t
        value_at += TILE * v_t
    dq_at += b * dq_b + h * dq_h + m[:, None] * dq_t + column
    tl.store(dq_at, (dq * scale).to(dq_at.dtype.element_ty), mask=is_query)


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """The gradients of queries, keys and values of attention without mask or dropout.

    Args:
        grad: (batch, heads, queries, width), of the output; float16 or bfloat16, as all but `lse`.
        query: of the same shape. Width is 16, 32 or 64.
        key: (batch, heads, keys, width).
        value: likewise.
        out: the output of forward, shaped as query.
        lse: (batch, heads, at least queries), float32: the logarithm of softmax's denominator, of scaled scores.
        scale: of the scores.
        grads: the gradients of query, key and value are written here; of any strides, but channels lie together.
    """
    query, key, value, out, grad = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, out, grad))
    dq, dk, dv = grads
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    padded = triton.cdiv(queries, _ROWS) * _ROWS
    sums = torch.empty(batch * heads * 2 * padded, dtype=torch.float32, device=query.device)

    def strides(*tensors: torch.Tensor) -> list[int]:
        return [stride for tensor in tensors for stride in tensor.stride()[:3]]

    _softmax_sums[(padded // _ROWS, batch * heads)](
        out, grad, lse, sums, *strides(out, grad), *lse.stride()[:2], heads, queries, padded, _LOG2_E, width, _ROWS
    )
    inputs = query, key, value, grad, sums
    sizes: tuple[Any, ...] = heads, queries, keys, padded, scale, scale * _LOG2_E, width, _TILE
    _grads_of_keys[(triton.cdiv(keys, _TILE), batch * heads)](
        *inputs, dk, dv, *strides(query, key, value, grad, dk, dv), *sizes, **_LAUNCH
    )
    _grad_of_queries[(triton.cdiv(queries, _TILE), batch * heads)](
        *inputs, dq, *strides(query, key, value, grad, dq), *sizes, **_LAUNCH
    )
