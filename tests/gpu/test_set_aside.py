"""Memory that serves something else for a while: its numbers come back, bit for bit."""

from __future__ import annotations

from sd3_lora.gpu.set_aside import set_aside

import numpy as np
import pytest
import torch
from small_transformer import CPU


def test_the_memory_is_free_meanwhile_and_the_numbers_come_back() -> None:
    whole = torch.randn(64)
    part, state = whole[16:32].view(4, 4), torch.arange(5, dtype=torch.uint8)
    before = whole.clone(), state.clone()
    with set_aside([whole, part, state, torch.empty(0)], CPU):
        assert whole.untyped_storage().nbytes() == state.untyped_storage().nbytes() == 0
    assert torch.equal(whole, before[0])
    assert torch.equal(state, before[1])
    assert torch.equal(part, before[0][16:32].view(4, 4))
    part += 1  # it is a view still
    assert torch.equal(whole[16:32], before[0][16:32] + 1)


def test_they_come_back_after_an_error() -> None:
    tensor = torch.randn(8)
    before = tensor.clone()

    def fail() -> None:
        with set_aside([tensor], CPU):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(tensor, before)


def test_memory_of_others_is_left_alone() -> None:
    """Of another device, of another library, and what pages itself."""
    foreign, elsewhere, paged = torch.from_numpy(np.ones(3)), torch.ones(3, device="meta"), torch.ones(3)
    paged.is_paged = True  # type: ignore[attr-defined]
    with set_aside([foreign, elsewhere, paged], CPU):
        assert foreign.tolist() == paged.tolist() == [1, 1, 1]
