"""The kernel that computes attention: the one that was asked for, tried beforehand."""

from __future__ import annotations

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.attention import attention_kernel, require_attention_kernel

import pytest
import torch
from small_transformer import CPU, GPU, needs_gpu


def enabled() -> list[bool]:
    cuda = torch.backends.cuda
    return [
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    ]


@pytest.mark.parametrize(("index", "kernel"), enumerate(["cudnn", "flash", "efficient", "math"]))
def test_only_the_kernel_that_was_asked_for_may_run(index: int, kernel: str) -> None:
    before = enabled()
    with attention_kernel(kernel):
        assert enabled() == [place == index for place in range(4)]
    assert enabled() == before
    with attention_kernel(None):
        assert enabled() == before


@pytest.mark.parametrize("trains", [False, True])
def test_what_does_not_run_is_refused(trains: bool) -> None:
    for kernel in (None, "flash", "math"):
        require_attention_kernel(kernel, CPU, torch.float32, 16, trains)
    for kernel in ("cudnn", "efficient"):
        with pytest.raises(UserError) as error:
            require_attention_kernel(kernel, CPU, torch.bfloat16, 16, trains)
        assert str(error.value) == f"--attention_kernel {kernel} does not run on a CPU in bfloat16: leave it out"


def test_a_kernel_without_backward_can_only_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return query.clone()

        @staticmethod
        def backward(ctx: object, *_: torch.Tensor) -> None:
            raise RuntimeError("not implemented")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", ForwardOnly.apply)
    require_attention_kernel("flash", CPU, torch.float32, 16, trains=False)
    with pytest.raises(UserError, match="--attention_kernel flash does not run on a CPU in float32"):
        require_attention_kernel("flash", CPU, torch.float32, 16, trains=True)


@needs_gpu
def test_a_gpu_refuses_flash_attention_in_float32() -> None:
    require_attention_kernel("flash", GPU, torch.float16, 64, trains=True)
    with pytest.raises(UserError, match=r"does not run on .* in float32: leave it out"):
        require_attention_kernel("flash", GPU, torch.float32, 64, trains=True)
