"""What a streamed step computes and copies, by the sizes of its model."""

from __future__ import annotations

import json

from sd3_lora import step_time
from sd3_lora.model_files import MINIATURE
from sd3_lora.step_memory import StepShape
from sd3_lora.step_time import (
    StepCost,
    StepSize,
    computed_flops,
    copied_flops,
    measure_flops_a_byte,
    model_costs,
)

import pytest
import torch
from small_transformer import CPU, GPU, needs_gpu


def test_what_a_step_computes_and_copies() -> None:
    """The miniature's width is 256; a block has 36 C^2 weights in matrices, 12 of them its modulations'."""
    config = json.loads((MINIATURE / "transformer" / "config.json").read_text())
    square, scores = 256**2, 4 * 113**2 * 256
    costs = model_costs(config, torch.float16, None)
    size = StepSize.of(config, StepShape(2, 8, 97, None, None, 4, 0.0, torch.float16, False))
    assert size == StepSize(2, 16, 97, 256)
    whole = 2 * ((8 + 16) * 113 * square + scores)
    last = 2 * (8 * 113 * square + 16 * 16 * square + scores)
    none = StepCost(computed_flops(costs, size, 0), copied_flops(costs, (), False))
    assert none.computed == pytest.approx(3 * (5 * whole + last), rel=1e-9)
    assert none.copied == 0
    two = StepCost(computed_flops(costs, size, 2), copied_flops(costs, (1, 3), False))
    assert two.computed - none.computed == pytest.approx(2 * whole, rel=1e-9)
    assert two.copied == 2 * 2 * square * (12 + 2 * 24) * 2048  # two blocks, two bytes
    assert two.time == (max(two.computed, two.copied), two.computed + two.copied)
    assert copied_flops(costs, (1, 3), True) == 10 * two.copied
    assert copied_flops(costs, (1, 3), False, 4096) == 2 * two.copied
    packed = model_costs(config, torch.float16, "nf4")
    assert copied_flops(packed, (1, 3), False) == two.copied / 4


def test_without_a_gpu_a_t4_is_planned_for() -> None:
    assert measure_flops_a_byte(CPU, torch.float16) == measure_flops_a_byte(CPU, torch.float32) == 2048


@pytest.mark.parametrize(("tflops", "gb", "rate"), [(20, 26, 256), (20, 13, 512), (40, 16, 1024), (500, 50, 4096)])
def test_what_was_measured_is_rounded(tflops: int, gb: int, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "_flops_a_second", lambda *_: tflops * 1e12)
    monkeypatch.setattr(step_time, "_bytes_a_second", lambda *_: gb * 1e9)
    for name in ("drop_workspaces", "free_memory"):
        monkeypatch.setattr(step_time, name, lambda *_: None)
    measure_flops_a_byte.cache_clear()
    assert measure_flops_a_byte(GPU, torch.float16) == rate
    measure_flops_a_byte.cache_clear()


@needs_gpu
def test_a_gpu_is_measured_and_nothing_stays() -> None:
    before = torch.cuda.memory_reserved()
    rates = []
    for _ in range(2):
        measure_flops_a_byte.cache_clear()
        rates.append(measure_flops_a_byte(GPU, torch.float16))
    assert torch.cuda.memory_reserved() <= before
    assert rates[1] in (rates[0] // 2, rates[0], rates[0] * 2)
    assert 128 <= rates[0] <= 32768
