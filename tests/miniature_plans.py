"""Plans for the miniature, without the fixed allowances, which are larger than it is."""

from __future__ import annotations

from functools import partial
from typing import Any

from sd3_lora.common.model_files import ModelFiles
from sd3_lora.gpu.budget import ASSUMED_CONTEXT_BYTES, DeviceBudget
from sd3_lora.plan import memory_plan
from sd3_lora.plan.memory_plan import Plan, TrainingTask, each_plan
from sd3_lora.plan.step_memory import StepMemory, StepShape, simulate_step
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.prior_flags import PriorConfig
from sd3_lora.transformer.placement import AskedPlacement
from train_dreambooth_sd3_lora_miniature import micro_step

import pytest
from small_transformer import CPU

STEP = partial(micro_step, flow=FlowConfig(), prior=PriorConfig())  # the script's own


def plan_without_allowances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the planner leave them out, on a host that holds everything.

    What was simulated once is not simulated again: that takes most of a plan's time.
    """
    for allowance, size in (("UNUSED_BYTES", 0), ("GRAPH_UNUSED_BYTES", 512), ("OFFLOAD_UNUSED_BYTES", 0)):
        monkeypatch.setattr(memory_plan, allowance, size)
    monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: 1 << 40)
    known: dict[str, StepMemory] = {}

    def simulate(*arguments: Any) -> StepMemory:
        key = repr(arguments)
        if key not in known:
            known[key] = simulate_step(*arguments)
        return known[key]

    monkeypatch.setattr(memory_plan, "simulate_step", simulate)


def budget_of(size: int) -> DeviceBudget:
    """So many bytes, on a CPU."""
    return DeviceBudget(size, ASSUMED_CONTEXT_BYTES, CPU)


def task_of(files: ModelFiles, shape: StepShape, can_stream: bool = True, **asked: Any) -> TrainingTask:
    """Of the script's step; `asked` are fields of `AskedPlacement`."""
    return TrainingTask(files, shape, STEP, AskedPlacement(**asked), can_stream)


def list_plans(task: TrainingTask, budget: DeviceBudget | None = None) -> list[Plan]:
    """`each_plan`, in a list."""
    return list(each_plan(task, budget or budget_of(1 << 40)))
