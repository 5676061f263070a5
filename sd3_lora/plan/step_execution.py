"""How a micro-step, or a forward that draws, is carried out: kernel by kernel from the host, or captured as one CUDA
graph and replayed (`cuda_graph.py`); with plain blocks or compiled ones (`compiled.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.devices import has_triton
from sd3_lora.gpu.attention import attention_kernel
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.gpu.exact_attention import AttentionBackward, exact_attention
from sd3_lora.plan.memory_plan import Plan
from sd3_lora.transformer.compiled import Compiled, blocks_were_compiled

import torch

# Compiling takes about half a minute, and saves a quarter of a micro-step: 23 of 90 ms at 1024 px on an H100, more on a
# slower GPU.
COMPILE_FROM_MICRO_STEPS = 2000
# Of drawing, in tokens of all forwards together: on an H200 it takes 13 s, and saves 0.26 s a picture of 1024 px.
COMPILE_FROM_TOKENS = 12_000_000
# Of drawing, calls of the transformer: capturing one takes the time of four, and one batch of 28 does not repay it.
# Streamed weights take longer than launching kernels, and under a budget a graph's memory is not shared.
CAPTURE_FROM_CALLS = 50
COMPILED, NOT_COMPILED = "blocks", "off or graph"  # as checkpoints have it


@dataclass(frozen=True)
class AskedExecution:
    """What flags fix; None leaves it to `choose_execution`.

    Attributes:
        compile: `--compile on` or off.
        capture: `--capture on` or off.
        deterministic: `--deterministic on` or off.
        base_pass: whether `--prior_term` calls the blocks without their LoRA too.
    """

    compile: bool | None = None
    capture: bool | None = None
    deterministic: bool | None = None
    base_pass: bool = False

    def compiles(self, device: torch.device, micro_steps: int, kernels_before: str | None = None) -> bool:
        """Whether blocks are compiled where they can be: as asked, as before, or where the run's steps repay it.

        Args:
            device: that computes.
            micro_steps: of the whole run.
            kernels_before: of the checkpoint that the run goes on from, whose numbers are kept.
        """
        if self.compile is not None:
            return self.compile
        if kernels_before is not None:
            return kernels_before == COMPILED
        is_repaid = micro_steps >= COMPILE_FROM_MICRO_STEPS and device.type == "cuda" and has_triton()
        return is_repaid and not self.deterministic and not self.base_pass


@dataclass(frozen=True)
class StepExecution:
    """How micro-steps are carried out.

    Attributes:
        compiled: whether the blocks are compiled: other kernels, other roundings.
        captured: whether a micro-step is captured as a CUDA graph.
        must_capture: whether that was asked for, so that a failure is an error.
        refusal: why a micro-step could not be captured, known after the first; None where it could, or was not tried.
        attention_backward: that computes attention's backward pass.
    """

    compiled: Compiled
    captured: bool
    must_capture: bool
    refusal: str | None = None
    attention_backward: AttentionBackward = AttentionBackward.TORCH

    @property
    def kernels(self) -> str:
        """Which kernels compute, as checkpoints have it; other kernels give other numbers."""
        return NOT_COMPILED if self.compiled is Compiled.NO else COMPILED

    def carried_out(self, call: CapturedCall | None) -> StepExecution:
        """The outcome after the last micro-step: what could not be compiled or captured ran without.

        Args:
            call: that was to be captured, if any.
        """
        compiled = self.compiled if blocks_were_compiled() else Compiled.NO
        captured, refusal = (call.captured, call.refusal) if call else (False, None)
        return replace(self, compiled=compiled, captured=captured, refusal=refusal)

    def to_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "compiled": self.compiled is not Compiled.NO,
            "captured": self.captured,
            "refusal": self.refusal,
            "attention_backward": self.attention_backward.name.lower(),
        }

    def sentence(self) -> str:
        """For the user."""
        kernels = "plain blocks" if self.compiled is Compiled.NO else "compiled blocks"
        launched = "replayed as one CUDA graph" if self.captured else "launched kernel by kernel"
        backward = self.attention_backward
        # Kernels that are compiled anew may add up in another order.
        is_exact = backward.is_exact and self.compiled is Compiled.NO
        exact = f"; the same bits each time (attention's backward pass: {backward.value})" if is_exact else ""
        return f"{kernels}, {launched}{exact}"


@dataclass(frozen=True)
class PlannedTraining:
    """All that is decided before the transformer is loaded.

    Attributes:
        plan: what is kept where.
        execution: how a micro-step is carried out.
        dtype: of the transformer.
        latent_size: height and width in which all crops lie, in latent pixels.
        steps: optimizer steps of the whole run.
    """

    plan: Plan
    execution: StepExecution
    dtype: torch.dtype
    latent_size: tuple[int, int]
    steps: int


@contextmanager
def attention_of(planned: PlannedTraining) -> Iterator[None]:
    """Inside the block attention is computed by the planned kernels, forward and backward."""
    backward = exact_attention(planned.execution.attention_backward)
    with attention_kernel(planned.plan.placement.attention_kernel), backward:
        yield


def choose_execution(
    asked: AskedExecution,
    plan: Plan,
    device: torch.device,
    dropout: float,
    micro_steps: int,
    kernels_before: str | None = None,
) -> StepExecution:
    """What flags fix; else the fastest way that this run can use, and whose compilation its steps repay.

    Args:
        asked: what flags fix.
        plan: with the placement of the base.
        device: that computes.
        dropout: of the LoRA: drawn by the host, so that no graph can hold it.
        micro_steps: of the whole run.
        kernels_before: of the checkpoint that the run goes on from, whose numbers are kept.

    Raises:
        UserError: this run cannot have what was asked for.
    """
    compiles = asked.compiles(device, micro_steps, kernels_before)
    of_loras = "blocks that --prior_term calls with and without their LoRA are not compiled" if asked.base_pass else ""
    return _execution(asked, plan, compiles, _why_no_graph(plan, device, dropout, bool(asked.capture)), of_loras)


def choose_drawing_execution(
    asked: AskedExecution, plan: Plan, device: torch.device, calls: int, tokens: int, several_strengths: bool
) -> StepExecution:
    """The same for drawing.

    Args:
        asked: what flags fix.
        plan: with the placement of the base.
        device: that computes.
        calls: of the transformer, in the whole run.
        tokens: in all of them together.
        several_strengths: whether LoRAs that are not merged change their strength.

    Raises:
        UserError: this run cannot have what was asked for.
    """
    is_repaid = tokens >= COMPILE_FROM_TOKENS and device.type == "cuda" and has_triton()
    compiles = is_repaid and not asked.deterministic if asked.compile is None else asked.compile
    of_loras = "blocks beside which LoRAs change their strength are not compiled" if several_strengths else ""
    if asked.capture is None and (plan.placement.streamed or calls < CAPTURE_FROM_CALLS):
        asked = replace(asked, capture=False)
    return _execution(asked, plan, compiles, _why_no_graph(plan, device, 0.0, bool(asked.capture)), of_loras)


def _execution(asked: AskedExecution, plan: Plan, compiles: bool, no_graph: str, of_loras: str) -> StepExecution:
    """What was asked for, or is wanted, where it is possible.

    Args:
        asked: what flags fix.
        plan: with the placement of the base.
        compiles: whether blocks are to be compiled where they can be.
        no_graph: why there can be no CUDA graph; empty where there can be one.
        of_loras: why LoRAs rule compiling out; empty where they do not.
    """
    no_compiling = (
        "streamed blocks are not compiled"
        if plan.placement.streamed
        else "4-bit weights are not compiled"
        if plan.placement.precision
        else "compiled kernels may add up in another order in the next run, which --deterministic on rules out"
        if asked.deterministic
        else of_loras
    )
    if asked.capture and no_graph:
        raise UserError(f"--capture on: {no_graph}: leave it out")
    if asked.compile and no_compiling:
        fits = plan.placement.streamed or plan.placement.precision
        remedy = "leave it out, or keep all blocks on the device in 16 bits" if fits else "leave one out"
        raise UserError(f"--compile on: {no_compiling}: {remedy}")
    compiled = Compiled.NO
    if compiles and not no_compiling:
        compiled = Compiled.ALWAYS if asked.compile else Compiled.WHERE_POSSIBLE
    return StepExecution(compiled, asked.capture is not False and not no_graph, bool(asked.capture))


def _why_no_graph(plan: Plan, device: torch.device, dropout: float, must_fit: bool) -> str:
    """Why a micro-step cannot be captured; empty if it can.

    Where the graph may not fit, it is tried unless it `must_fit`: the step then runs kernel by kernel.
    """
    if device.type != "cuda":
        return "it needs a GPU"
    if plan.placement.stream_from == "files" and plan.placement.streamed:
        return "the host reads streamed blocks from files"
    if must_fit and not plan.forecast.has_room_for_graph:
        return "its graph may not fit into the budget"
    return "dropout is drawn by the host" if dropout else ""
