"""How a micro-step is carried out: kernel by kernel from the host, recorded as one CUDA graph (`recorded.py`), or with
its blocks compiled as well, which are fewer kernels and round elsewhere.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.plan.memory_plan import TrainingPlan

import torch
from diffusers import SD3Transformer2DModel

AskedCompile = Literal["auto", "off", "blocks", "graph"]
# Compiling takes about half a minute, and saves a quarter of a micro-step: 23 of 90 ms at 1024 px on an H100, more on a
# slower GPU.
COMPILE_FROM_MICRO_STEPS = 2000
COMPILED = "blocks"


@dataclass(frozen=True)
class StepExecution:
    """How micro-steps are carried out.

    Attributes:
        compiled: whether the blocks are compiled: other kernels, other roundings.
        recorded: whether a micro-step is recorded as a CUDA graph.
        asked: whether the user asked for it, so that it must not quietly be something else.
        refusal: why a micro-step could not be captured, known after the first; None where it could, or was not tried.
    """

    compiled: bool
    captured: bool
    asked: bool
    refusal: str | None = None

    @property
    def kernels(self) -> str:
        """What decides the numbers, as --compile names it."""
        return COMPILED if self.compiled else "off or graph"

    def in_force(self, call: CapturedCall | None) -> StepExecution:
        """What came of it, after the last micro-step: what could not be compiled or captured ran as it was.

        Args:
            call: that was to be captured, if any.
        """
        return StepExecution(
            self.compiled and _blocks_were_compiled(),
            call is not None and call.captured,
            self.asked,
            call.refusal if call else None,
        )

    def sentence(self) -> str:
        """In words."""
        kernels = "blocks compiled" if self.compiled else "plain kernels"
        return f"{kernels}, {'replayed as one CUDA graph' if self.captured else 'started one by one'}"


def choose_execution(
    asked: AskedCompile,
    plan: TrainingPlan,
    device: torch.device,
    dropout: float,
    micro_steps: int,
    kernels_before: str | None = None,
) -> StepExecution:
    """What was asked for; under auto the fastest that this run can have and that the steps to come repay.

    Args:
        asked: `--compile`.
        plan: where the base is.
        device: that computes.
        dropout: of the LoRA: drawn by the host, so that no graph can hold it.
        micro_steps: of the whole run.
        kernels_before: of the checkpoint that the run goes on from; auto keeps its numbers.

    Raises:
        UserError: this run cannot have what was asked for.
    """
    no_graph = (
        "it needs a GPU"
        if device.type != "cuda"
        else "the host reads what visits the device from files"
        if plan.from_files
        else "its graph may not fit into the budget"  # under auto it is tried, and the step computed as it is if not
        if asked == "graph" and not plan.has_room_for_graph
        else "dropout is drawn by the host"
        if dropout
        else ""
    )
    no_compiling = (
        "blocks that visit the device are not compiled"
        if plan.streamed
        else "4-bit weights are not compiled"
        if plan.base_precision
        else ""
    )
    if asked == "graph" and no_graph:
        raise UserError(f"--compile graph: {no_graph}: leave it out")
    if asked == "blocks" and no_compiling:
        raise UserError(f"--compile blocks: {no_compiling}: leave it out, or give more memory with --vram_budget_gib")
    if asked == "auto":
        repaid = micro_steps >= COMPILE_FROM_MICRO_STEPS and device.type == "cuda" and _has_triton()
        compiled = not no_compiling and (repaid if kernels_before is None else kernels_before == COMPILED)
    else:
        compiled = asked == "blocks"
    return StepExecution(compiled, asked != "off" and not no_graph, asked in ("blocks", "graph"))


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None  # not on Windows


def _blocks_were_compiled() -> bool:
    """Whether all was compiled that had to be since `compile_blocks`; torch runs as it is what does not compile."""
    from torch._dynamo.utils import counters

    frames = counters["frames"]
    return 0 < frames["ok"] == frames["total"]


def compile_blocks(transformer: SD3Transformer2DModel, asked: bool) -> None:
    """Has each block compiled when it first runs; blocks of one kind share their kernels.

    Args:
        transformer: with its LoRA attached.
        asked: whether the user asked for it; else a block that does not compile runs as it is.
    """
    from torch import _dynamo  # its import costs seconds, and only this needs it

    # After runs of other shapes in this process kernels would be made for any shape, and in the end none any more.
    _dynamo.reset()
    _dynamo.utils.counters.clear()
    _dynamo.config.suppress_errors = not asked
    for block in transformer.transformer_blocks:
        block.compile()
