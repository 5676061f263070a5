"""What a streamed step computes and copies, by the sizes of its model."""

from __future__ import annotations

import json
import sys

from sd3_lora.common.model_files import MINIATURE
from sd3_lora.common.placement_flags import StreamSource
from sd3_lora.plan import step_time
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
from sd3_lora.transformer.placement import Placement, spread_streamed_blocks

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
    size = StepSize.of(config, StepShape(2, (8, 8), 97, None, None, 4, 0.0, torch.float16, 16))
    assert size == StepSize(2, 16, 97, 256)
    whole = 2 * ((8 + 16) * 113 * square + scores)
    last = 2 * (8 * 113 * square + 16 * 16 * square + scores)
    sizes = block_sizes(costs)

    def placed(recomputed: int, stream_from: StreamSource = "host", ahead: bool = True) -> Placement:
        blocks = tuple(range(recomputed))
        return Placement(6, streamed=(1, 3), stream_from=stream_from, recomputed=blocks, modulations_ahead=ahead)

    none = StepCost(computed_flops(costs, size, ()), copied_flops(sizes, Placement(6)))
    assert none.computed == pytest.approx((5 * whole + last, 2 * (5 * whole + last)), rel=1e-9)
    assert none.copied == (0, 0)
    two = StepCost(computed_flops(costs, size, range(2)), copied_flops(sizes, placed(2)))
    assert two.computed.forward == none.computed.forward
    assert two.computed.backward - none.computed.backward == pytest.approx(2 * whole, rel=1e-9)
    assert computed_flops(costs, size, (0, 4)) == two.computed  # which blocks, not how many of the first
    assert computed_flops(costs, size, (0, 5)).backward < two.computed.backward  # the last one is smaller
    # Two blocks, two bytes: the first one's modulations are copied in backward, the second one's in forward.
    assert two.copied == (2 * square * (2 * 24 + 12) * 2048, 2 * square * (2 * 24 + 12) * 2048)
    assert copied_flops(sizes, placed(4)) == (2 * 2 * square * 24 * 2048, 2 * 2 * square * (12 + 24) * 2048)
    assert copied_flops(sizes, placed(0)) == (2 * 2 * square * (12 + 24) * 2048, 2 * 2 * square * 24 * 2048)
    # A pass of the base: a forward of the pictures without gradient, which copies all of its pieces.
    both = StepSize.of(
        config, StepShape(2, (8, 8), 97, None, None, 4, 0.0, torch.float16, 16, prior_rows=2, base_rows=2)
    )
    assert both == StepSize(4, 16, 97, 256, base_rows=2)
    assert computed_flops(costs, both, ()) == pytest.approx(
        (3 * none.computed.forward, 2 * none.computed.backward), rel=1e-9
    )
    more = copied_flops(sizes, placed(2), base_pass=True)
    assert more.forward == two.copied.forward + 2 * square * 2 * 36 * 2048
    assert more.backward == two.copied.backward
    assert copied_flops(sizes, placed(2, "files")) == tuple(10 * flops for flops in two.copied)
    assert copied_flops(sizes, placed(2), 4096) == tuple(2 * flops for flops in two.copied)
    # Not ahead, they are all copied in forward, and the recomputed block's in backward too.
    not_ahead = copied_flops(sizes, placed(2, ahead=False))
    assert not_ahead == (2 * square * (2 * 24 + 2 * 12) * 2048, two.copied.backward)
    packed = model_costs(config, torch.float16, "nf4")
    assert copied_flops(block_sizes(packed), placed(2)) == tuple(flops / 4 for flops in two.copied)


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
    whole = sum(computed_flops(costs, size, range(24)))
    rate = whole / resident["step_ms"] / streamed[0]["link_gb_per_s"] / 1e6
    for row in streamed:
        blocks, recomputed = spread_streamed_blocks(24, row["streamed"][1]), tuple(range(23))
        copied = copied_flops(block_sizes(costs), Placement(24, streamed=blocks, recomputed=recomputed), rate)
        cost = StepCost(computed_flops(costs, size, recomputed), copied)
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
