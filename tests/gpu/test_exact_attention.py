"""Attention's backward pass: the right numbers, and on a GPU the same bits in every call."""

from __future__ import annotations

import importlib.util

import sd3_lora.gpu.exact_attention as module
from sd3_lora.gpu.exact_attention import (
    AttentionBackward,
    choose_backward,
    chunk_count,
    exact_attention,
    scratch_bytes,
)

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

GPU = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EXACT = [AttentionBackward.TRITON, AttentionBackward.FLASH, AttentionBackward.CHUNKS]
FORWARD = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def inputs(batch: int, tokens: int, width: int, dtype: torch.dtype, transposed: bool) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient of 3 heads, stored token by token (transposed) or head by head."""
    generator = torch.Generator(GPU).manual_seed(tokens)
    shape = (batch, tokens, 3, width) if transposed else (batch, 3, tokens, width)
    drawn = [torch.randn(shape, generator=generator, device=GPU).to(dtype) for _ in range(4)]
    return [tensor.transpose(1, 2) if transposed else tensor for tensor in drawn]


def gradients(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Of attention, by whatever kernels are in force."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    return list(torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*leaves), leaves, grad))


@on_gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1178, 64), (2, 413, 64), (2, 64, 32), (1, 31, 16)])
@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("backward", EXACT)
def test_gradients_are_right_and_the_same_in_every_call(
    backward: AttentionBackward,
    forward: str,
    batch: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    """Against float64, with poisoned memory, for numbers of tokens that fill no tile."""
    if backward is AttentionBackward.TRITON and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    given = inputs(batch, tokens, width, dtype, transposed)
    right = gradients(*(tensor.double() for tensor in given))
    with sdpa_kernel([FORWARD[forward]]), exact_attention(backward):
        torch.full((4 * given[0].numel(),), float("nan"), device=GPU)  # what is not written shows
        found = gradients(*given)
        for _ in range(4):
            assert all(map(torch.equal, gradients(*given), found))
    tolerance = 2e-3 if dtype is torch.float16 else 1.2e-2
    for ours, reference in zip(found, right, strict=True):
        assert float((ours.double() - reference).norm() / reference.norm()) < tolerance


@on_gpu
def test_torch_s_own_backward_pass_is_back_behind_the_block() -> None:
    """Another kernel's last bits show it."""
    given = inputs(1, 1178, 64, torch.float16, False)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        before = gradients(*given)
        with exact_attention(AttentionBackward.CHUNKS):
            within = gradients(*given)
        after = gradients(*given)
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[2], within[2])


@on_gpu
def test_causal_attention_is_refused() -> None:
    """It would get the gradient of another function."""
    leaves = [tensor.requires_grad_() for tensor in inputs(1, 64, 64, torch.float16, False)[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    with exact_attention(AttentionBackward.FLASH), pytest.raises(NotImplementedError, match="causal"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "kernel", "has_triton", "deterministic", "expected"),
    [
        ((9, 0), torch.float16, 64, None, True, None, "TRITON"),
        ((8, 6), torch.bfloat16, 64, "flash", True, True, "TRITON"),
        ((8, 6), torch.float16, 64, None, True, False, "TORCH"),  # --deterministic off
        ((8, 6), torch.float16, 64, None, False, None, "TORCH"),  # without Triton exactness has its price
        ((8, 6), torch.float16, 64, None, False, True, "FLASH"),
        ((8, 6), torch.float16, 128, None, True, True, "FLASH"),  # heads too wide for the tiles
        ((8, 6), torch.float32, 64, None, True, None, "TORCH"),
        ((8, 6), torch.float32, 64, None, True, True, "CHUNKS"),
        ((7, 5), torch.float16, 64, None, True, None, "TORCH"),  # a T4
        ((7, 5), torch.float16, 64, None, True, True, "CHUNKS"),
        ((9, 0), torch.float16, 64, "math", True, True, "TORCH"),  # exact as it is
    ],
)
def test_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    kernel: str | None,
    has_triton: bool,
    deterministic: bool | None,
    expected: str,
) -> None:
    """Triton's where it runs; what is slower only on request."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(module, "_triton_runs", lambda *_: has_triton)
    found = choose_backward(GPU, dtype, width, kernel, deterministic)  # type: ignore[arg-type]
    assert found is AttentionBackward[expected]


def test_a_cpu_keeps_torch_s() -> None:
    """Which is exact there."""
    assert choose_backward(torch.device("cpu"), torch.float32, 64, None, True) is AttentionBackward.TORCH


def test_chunks_fill_the_gpu() -> None:
    """Two thread blocks for each multiprocessor, and chunks of no less than 64 queries."""
    assert chunk_count(heads=24, queries=4250, processors=40) == 4
    assert chunk_count(heads=24, queries=4250, processors=132) == 11
    assert chunk_count(heads=24, queries=100, processors=132) == 1


def test_the_memory_beside_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SD3-Medium at 1024 px in float16, in bytes."""
    monkeypatch.setattr(module, "_processors", lambda: 40)
    query = torch.empty(1, 24, 4250, 64, dtype=torch.float16, device="meta")
    rows = 24 * 4250
    assert scratch_bytes(AttentionBackward.TORCH, query, query) == rows * 65 * 4
    assert scratch_bytes(AttentionBackward.TRITON, query, query) == rows * 8
    assert scratch_bytes(AttentionBackward.FLASH, query, query) == rows * (4 * (64 * 2 + 1) + 2 * 64 * 3)
    four_chunks = rows * (64 * (4 * 2 + 4) + 4) + rows * 64 * (2 * 4 * 2 + 4)
    assert scratch_bytes(AttentionBackward.CHUNKS, query, query) == four_chunks
