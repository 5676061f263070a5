"""A stage's report: what the block took is in it, and what came before is not."""

from __future__ import annotations

import weakref
from pathlib import Path

from sd3_lora.common import memory
from sd3_lora.common.memory import GIB, available_host_bytes, free_memory, host_bytes, only_new_garbage
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.gpu.budget import DeviceBudget, compared

import psutil
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
    """Each stage resets the allocator's peak, so that its own figure alone would be the last stage's."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1 * GIB)
    budget = DeviceBudget(8 * GIB, GIB // 2, torch.device("cuda"))
    stages = [StageReport("encode", peak_reserved_gib=3.0), StageReport("decode", peak_reserved_gib=1.0)]
    assert budget.used_bytes() == 1.5 * GIB
    assert budget.used_bytes(stages) == 3.5 * GIB
    assert DeviceBudget(8 * GIB, GIB // 2, CPU).used_bytes(stages) == 0


def test_a_prediction_beside_what_came_of_it() -> None:
    assert compared(3 * GIB, 2 * GIB) == "peak: predicted 3.00 GiB, measured 2.00"
    assert compared(3 * GIB, 0) == "peak: predicted 3.00 GiB, not measured: no GPU"


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_a_control_group_limits_the_host(tmp_path: Path) -> None:
    """Both versions, at any level; pages of files can be dropped, so they are free."""
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    assert memory._free_in_groups(own, mounted) == []
    own.write_text("4:cpu,memory:/docker/abc\n0::/a/b\n")
    assert memory._free_in_groups(own, mounted) == []
    stat = "anon 600\ninactive_file 250\nactive_file 50\nfile 900"
    write_group(mounted / "a", memory__max="1000", memory__current="900", memory__stat=stat)
    write_group(mounted / "a" / "b", memory__max="max", memory__current="900", memory__stat=stat)
    stat = "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 30"
    files = {"memory__limit_in_bytes": "2000", "memory__usage_in_bytes": "100", "memory__stat": stat}
    write_group(mounted / "memory", **files)
    assert sorted(memory._free_in_groups(own, mounted)) == [400, 1950]
    (mounted / "a" / "memory.stat").unlink()  # nothing is known to be free then
    (mounted / "memory" / "memory.stat").write_text("total_cache\n")
    assert sorted(memory._free_in_groups(own, mounted)) == [100, 1900]
    (mounted / "a" / "memory.max").unlink()
    (mounted / "memory" / "memory.limit_in_bytes").write_text("\n")
    assert memory._free_in_groups(own, mounted) == []


def test_what_the_host_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory().available
    assert 0 < available_host_bytes() <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_free_in_groups", lambda *_: [free + 2**60, 12])
    assert available_host_bytes() == 12
    monkeypatch.setattr(memory, "_free_in_groups", lambda *_: [])
    assert available_host_bytes() == pytest.approx(free, rel=0.5)


def test_only_new_garbage_is_looked_for() -> None:
    """And all of it again afterwards."""

    class Cycle:
        def __init__(self) -> None:
            self.own = self

    old, gone = Cycle(), []
    weakref.finalize(old, gone.append, "old")
    free_memory(CPU)
    with only_new_garbage():
        new = Cycle()
        weakref.finalize(new, gone.append, "new")
        del old, new
        free_memory(CPU)
        assert gone == ["new"]
    free_memory(CPU)
    assert gone == ["new", "old"]
