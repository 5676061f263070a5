"""How a micro-step is carried out: kernel by kernel from the host, recorded as one CUDA graph, or compiled as well.

A micro-step of SD3-Medium is some six thousand kernels, many shorter than the host needs to start one. A graph starts
them all at once, and they are the same kernels: the numbers stay what they are, bit for bit. Compiled blocks are fewer
kernels, which round elsewhere.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sd3_lora.command_line import UserError
from sd3_lora.memory import drop_workspaces, free_memory
from sd3_lora.memory_plan import TrainingPlan

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
    """

    compiled: bool
    recorded: bool
    asked: bool

    @property
    def kernels(self) -> str:
        """What decides the numbers, as --compile names it."""
        return COMPILED if self.compiled else "off or graph"

    def sentence(self) -> str:
        """In words."""
        kernels = "blocks compiled" if self.compiled else "plain kernels"
        return f"{kernels}, {'replayed as one CUDA graph' if self.recorded else 'started one by one'}"


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


def compile_blocks(transformer: SD3Transformer2DModel, asked: bool) -> None:
    """Has each block compiled when it first runs; blocks of one kind share their kernels.

    Args:
        transformer: with its LoRA attached.
        asked: whether the user asked for it; else a block that does not compile runs as it is.
    """
    from torch import _dynamo  # its import costs seconds, and only this needs it

    # After runs of other shapes in this process kernels would be made for any shape, and in the end none any more.
    _dynamo.reset()
    _dynamo.config.suppress_errors = not asked
    for block in transformer.transformer_blocks:
        block.compile()


class RecordedStep:
    """A micro-step that is recorded the first time it is called, and replayed from then on.

    What the first replay gives is compared with what the plain step gave: a graph that lacked a copy or a wait would
    give other numbers without a word.

    Args:
        compute: tensors of always the same shapes → a loss. It may change no memory but `gradient`, to which it adds,
            and must draw nothing at random.
        gradient: of the LoRA; zero when the first step is called.
        asked: whether the user asked for it; else a step that cannot be recorded is computed as it is.
        say: told why not.
    """

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        gradient: torch.Tensor,
        asked: bool,
        say: Callable[[str], None] = print,
    ):
        self._compute, self._gradient = compute, gradient
        self._asked, self._say = asked, say
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._loss = torch.empty(())
        self._may_record = True

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The loss, a float32 scalar; what its backward adds is in the gradient."""
        if self._may_record and self._graph is None:
            self._record(inputs)
        if self._graph is None:
            return self._compute(*inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._loss.clone()

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> None:
        device = self._gradient.device
        self._inputs = tuple(map(torch.clone, inputs))
        try:
            # Once as it is, on another stream as graphs ask for it: kernels are loaded and workspaces made.
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                loss = self._compute(*self._inputs)
            torch.cuda.current_stream(device).wait_stream(aside)
            torch.cuda.synchronize(device)
            expected = [tensor.to("cpu", copy=True) for tensor in (loss, self._gradient)]
            del loss
            # The graph has memory of its own: what that run took goes back first, or the peak would double.
            drop_workspaces(device)
            free_memory(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                self._loss = self._compute(*self._inputs)
            self._gradient.zero_()
            graph.replay()
            if not all(map(_is_close, (self._loss.cpu(), self._gradient.cpu()), expected)):
                raise RuntimeError("its replay gives other numbers than the plain step")
            self._graph = graph
        except RuntimeError as error:
            if self._asked:
                raise
            self._may_record = False
            self._inputs, graph = (), None
            cause = error.__context__ or error  # the recording's end may fail for what failed in it
            for found in (error, cause):
                traceback.clear_frames(found.__traceback__)  # which hold what was computed
            free_memory(device)
            self._say(f"not replayed as a graph ({str(cause).splitlines()[0]}); kernels are started one by one")
        finally:
            self._gradient.zero_()


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for the order in which some kernels sum; and for infinities, which the first loss scale makes."""
    both = found.isfinite() & expected.isfinite()
    difference = torch.where(both, found - expected, 0).double().norm()
    return bool(difference <= 0.01 * torch.where(both, expected, 0).double().norm())
