"""A stage's report: what the block took is in it, and what came before is not."""

from __future__ import annotations

from sd3_lora.budget import DeviceBudget, compared
from sd3_lora.memory import GIB, StageReport, host_bytes, memory_stage

import pytest
import torch

CPU = torch.device("cpu")


def test_the_peak_of_the_host_is_seen_even_if_freed_at_once() -> None:
    reports: list[StageReport] = []
    before = host_bytes()
    with memory_stage("fill", CPU, reports, lambda _: None):
        block = torch.ones(64 * 1024**2)  # 256 MiB
        time_to_sample(block)
        del block
    with memory_stage("idle", CPU, reports, lambda _: None):
        pass
    fill, idle = reports
    assert 0.2 * GIB < fill.peak_host_gib * GIB - before < 0.6 * GIB
    assert idle.peak_host_gib < fill.peak_host_gib - 0.2
    assert fill.peak_device_gib == 0


def time_to_sample(block: torch.Tensor) -> None:
    for _ in range(5):
        block.mul_(1.0)


def test_a_failing_block_is_reported_too() -> None:
    reports: list[StageReport] = []
    with pytest.raises(ZeroDivisionError), memory_stage("fail", CPU, reports, lambda _: None):
        raise ZeroDivisionError
    assert [report.name for report in reports] == ["fail"]
    assert reports[0].elapsed_s >= 0


def test_the_sentence_says_what_there_is() -> None:
    assert StageReport("train", 2.0, 0.0, 0.0, 1.5).sentence() == "train: 2.0 s, peak host 1.50 GiB"
    assert StageReport("train", 2.0, 3.0, 4.0, 1.5).sentence().endswith(", device 3.00 GiB")


def test_what_was_used_counts_the_stages_that_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has the allocator count anew, so that its own figure alone would be the last stage's."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1 * GIB)
    budget = DeviceBudget(8 * GIB, GIB // 2, torch.device("cuda"))
    stages = [StageReport("encode", peak_reserved_gib=3.0), StageReport("decode", peak_reserved_gib=1.0)]
    assert budget.used_bytes() == 1.5 * GIB
    assert budget.used_bytes(stages) == 3.5 * GIB
    assert DeviceBudget(8 * GIB, GIB // 2, CPU).used_bytes(stages) == 0


def test_a_prediction_beside_what_came_of_it() -> None:
    assert compared(3 * GIB, 2 * GIB) == "peak: predicted 3.00 GiB, measured 2.00"
    assert compared(3 * GIB, 0) == "peak: predicted 3.00 GiB, not measured: no GPU"
