"""The VAE's group norms spread over a GPU: the numbers of torch's own."""

from __future__ import annotations

from sd3_lora.stage_one.vae_norms import spread_group_norms

import pytest
import torch
from small_transformer import needs_gpu


def norms(dtype: torch.dtype, device: str) -> tuple[torch.nn.GroupNorm, torch.nn.GroupNorm]:
    """Two of the same weights, the second spread."""
    torch.manual_seed(0)
    plain, other = (torch.nn.GroupNorm(4, 12, eps=1e-6) for _ in range(2))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(plain.state_dict())
    spread_group_norms(torch.nn.Sequential(other))
    return plain.to(device, dtype), other.to(device, dtype)


def test_nothing_changes_on_a_cpu() -> None:
    plain, spread = norms(torch.float32, "cpu")
    x = torch.randn(2, 12, 5, 7)
    assert torch.equal(spread(x), plain(x))


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(1, 12, 64, 48), (3, 12, 9, 7), (2, 12, 77)])
def test_a_gpu_gives_what_torch_gives(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, channels_last: bool
) -> None:
    if channels_last and len(shape) < 4:
        pytest.skip("a sequence has no such layout")
    plain, spread = norms(dtype, "cuda")
    x = 3 + 2 * torch.randn(shape, device="cuda")
    x[:, :3] = 0.5  # a group without variance
    x = x.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with torch.no_grad():
        found, expected = spread(x), plain.double()(x.double())
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    assert ((found - expected).norm() / expected.norm()).item() < tolerance
