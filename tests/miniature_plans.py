"""Plans for the miniature, without the fixed allowances, which are larger than it is."""

from __future__ import annotations

from typing import Any

from sd3_lora.gpu.budget import ASSUMED_CONTEXT_BYTES, DeviceBudget
from sd3_lora.plan import memory_plan
from sd3_lora.plan.memory_plan import TrainingPlan, each_plan
from sd3_lora.plan.step_memory import StepMemory, simulate_step

import pytest
from small_transformer import CPU


def plan_without_allowances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the planner leave them out, on a host that holds everything.

    What was simulated once is not simulated again: that takes most of a plan's time.
    """
    for allowance, size in (("UNUSED_BYTES", 0), ("GRAPH_UNUSED_BYTES", 512), ("OFFLOAD_UNUSED_BYTES", 0)):
        monkeypatch.setattr(memory_plan, allowance, size)
    monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: 1 << 40)
    known: dict[str, StepMemory] = {}

    def simulate(*words: Any) -> StepMemory:
        key = repr(words)
        if key not in known:
            known[key] = simulate_step(*words)
        return known[key]

    monkeypatch.setattr(memory_plan, "simulate_step", simulate)


def budget_of(size: int) -> DeviceBudget:
    """So many bytes, on a CPU."""
    return DeviceBudget(size, ASSUMED_CONTEXT_BYTES, CPU)


def list_plans(*words: Any, **more: Any) -> list[TrainingPlan]:
    """`each_plan`, in a list."""
    return list(each_plan(*words, **more))
