"""What a streamed step computes and copies, by the sizes of its model."""

from __future__ import annotations

import json
import sys

from sd3_lora.common.model_files import MINIATURE
from sd3_lora.plan import step_time
from sd3_lora.plan.memory_plan import spread_streamed_blocks
from sd3_lora.plan.step_memory import StepShape
from sd3_lora.plan.step_time import (
    Passes,
    StepCost,
    StepSize,
    block_sizes,
    computed_flops,
    copied_flops,
    measure_flops_a_byte,
    model_costs,
)

import pytest
import torch
from conftest import PROJECT
from small_transformer import CPU, GPU, needs_gpu

sys.path.insert(0, str(PROJECT / "benchmarks"))

import random_sd3


def test_what_a_step_computes_and_copies() -> None:
    """The miniature's width is 256; a block has 36 C^2 weights in matrices, 12 of them its modulations'."""
    config = json.loads((MINIATURE / "transformer" / "config.json").read_text())
    square, scores = 256**2, 4 * 113**2 * 256
    costs = model_costs(config, torch.float16, None)
    size = StepSize.of(config, StepShape(2, 8, 97, None, None, 4, 0.0, torch.float16, False))
    assert size == StepSize(2, 16, 97, 256)
    whole = 2 * ((8 + 16) * 113 * square + scores)
    last = 2 * (8 * 113 * square + 16 * 16 * square + scores)
    none = StepCost(computed_flops(costs, size, 0), copied_flops(block_sizes(costs), (), 0, False))
    assert none.computed == pytest.approx((5 * whole + last, 2 * (5 * whole + last)), rel=1e-9)
    assert none.copied == (0, 0)
    two = StepCost(computed_flops(costs, size, 2), copied_flops(block_sizes(costs), (1, 3), 2, False))
    assert two.computed.forward == none.computed.forward
    assert two.computed.backward - none.computed.backward == pytest.approx(2 * whole, rel=1e-9)
    # Two blocks, two bytes: the first one's modulations are copied in backward, the second one's in forward.
    assert two.copied == (2 * square * (2 * 24 + 12) * 2048, 2 * square * (2 * 24 + 12) * 2048)
    assert copied_flops(block_sizes(costs), (1, 3), 4, False) == (
        2 * 2 * square * 24 * 2048,
        2 * 2 * square * (12 + 24) * 2048,
    )
    assert copied_flops(block_sizes(costs), (1, 3), 0, False) == (
        2 * 2 * square * (12 + 24) * 2048,
        2 * 2 * square * 24 * 2048,
    )
    assert copied_flops(block_sizes(costs), (1, 3), 2, True) == tuple(10 * flops for flops in two.copied)
    assert copied_flops(block_sizes(costs), (1, 3), 2, False, 4096) == tuple(2 * flops for flops in two.copied)
    packed = model_costs(config, torch.float16, "nf4")
    assert copied_flops(block_sizes(packed), (1, 3), 2, False) == tuple(flops / 4 for flops in two.copied)


def test_in_each_pass_the_longer_of_both_counts() -> None:
    cost = StepCost(Passes(10, 30), Passes(24, 16))
    assert cost.time == (24 + 30, 80)
    assert StepCost(Passes(10, 30), Passes(8, 16)).time == (10 + 30, 64)


@pytest.mark.parametrize("resolution", [1024, 512])
def test_what_was_measured_is_in_that_order(resolution: int) -> None:
    """Of the committed times on an H200, relative to the resident step's."""
    result = json.loads((PROJECT / "benchmarks" / "results" / "streaming-h200.json").read_text())
    rows = [row for row in result["rows"] if row["resolution"] == resolution]
    (resident,) = [row for row in rows if not row["streamed"]]
    streamed = [row for row in rows if row["streamed"] and row["streamed"][0] == 6]
    assert len(streamed) == 4
    with torch.device("meta"):
        transformer = random_sd3.make_transformer("sd3-medium")
    costs = model_costs(dict(transformer.config), torch.float16, None)
    size = StepSize(1, (resolution // 16) ** 2, 154, 1536)
    whole = sum(computed_flops(costs, size, 24))
    rate = whole / resident["step_ms"] / streamed[0]["link_gb_per_s"] / 1e6
    for row in streamed:
        streamed_blocks = spread_streamed_blocks(24, row["streamed"][1])
        cost = StepCost(
            computed_flops(costs, size, 23), copied_flops(block_sizes(costs), streamed_blocks, 23, False, rate)
        )
        assert cost.time[0] / whole == pytest.approx(row["step_ms"] / resident["step_ms"], rel=0.12)


def test_without_a_gpu_a_t4_is_planned_for() -> None:
    assert measure_flops_a_byte(CPU, torch.float16) == measure_flops_a_byte(CPU, torch.float32) == 2048


@pytest.mark.parametrize(("tflops", "gb", "rate"), [(20, 40, 256), (20, 26, 362), (20, 17, 512), (580, 55, 4096)])
def test_what_was_measured_is_rounded(tflops: int, gb: int, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "_flops_a_second", lambda *_: tflops * 1e12)
    monkeypatch.setattr(step_time, "bytes_a_second", lambda *_: gb * 1e9)
    for name in ("drop_workspaces", "free_memory"):
        monkeypatch.setattr(step_time, name, lambda *_: None)
    measure_flops_a_byte.cache_clear()
    assert measure_flops_a_byte(GPU, torch.float16) == pytest.approx(rate, rel=0.001)
    measure_flops_a_byte.cache_clear()


@needs_gpu
def test_a_gpu_is_measured_and_nothing_stays() -> None:
    before = torch.cuda.memory_reserved()
    rates = []
    for _ in range(2):
        measure_flops_a_byte.cache_clear()
        rates.append(measure_flops_a_byte(GPU, torch.float16))
    assert torch.cuda.memory_reserved() <= before
    assert rates[0] / 1.5 < rates[1] < rates[0] * 1.5
    assert 128 <= rates[0] <= 32768
