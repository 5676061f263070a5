"""What training and drawing keep where, so that it fits a budget; and the peak that this will have, part by part.

The peak is the sum of CUDA's own memory, the base's weights, the LoRA with its gradients and optimizer, and the step:
the activations that are kept for backward and the working memory beside them (`step_memory.py`).

Of the measures that leave every number what it is, the fastest that fits is taken: compute k of the n blocks anew, as
few as will do; then send the blocks' inputs to the host; then let the matrices of blocks visit the device
(`streaming.py`), of as few as will do, and compute k anew again: how many of each, is weighed by what the step computes
and copies (`step_time.py`). Weights in 4 bits change the numbers, and have to be asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar

from sd3_lora.common.memory import GIB, available_host_bytes
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.gpu.budget import BudgetTooSmall, DeviceBudget, enough_gib
from sd3_lora.gpu.pinned_memory import pinned_bytes
from sd3_lora.plan.step_memory import DenoisingShape, StepMemory, StepShape, simulate_denoising, simulate_step
from sd3_lora.plan.step_time import (
    StepCost,
    StepSize,
    block_sizes,
    computed_flops,
    copied_flops,
    measure_flops_a_byte,
    model_costs,
)
from sd3_lora.transformer.base_weights import BasePrecision, base_bytes
from sd3_lora.transformer.mapped_pieces import ring_sizes

import torch

CLIP_TOKENS = 77  # of SD3's CLIPs; T5's tokens follow them
AskedPrecision = Literal["16bit", "nf4", "auto"]
_PRECISIONS: dict[AskedPrecision, list[BasePrecision | None]] = {
    "16bit": [None],
    "nf4": ["nf4"],
    "auto": [None, "nf4"],
}
# cuBLAS keeps a workspace for the stream that multiplies, 32 MiB on Hopper and 8 MiB on others.
WORKSPACE_BYTES = 32 * 1024**2
# The allocator takes whole pages from the driver, and what lies between tensors stays unused; a second stream, which
# streaming copies on, has pages of its own.
UNUSED_BYTES = 48 * 1024**2
# A recorded step has pages of its own, and more for the stream on which inputs leave and come.
GRAPH_UNUSED_BYTES = 8 * 1024**2
OFFLOAD_UNUSED_BYTES = 48 * 1024**2
UNUSED_SHARE = 0.005
# For a streamed base: past six nothing is gained, since by then a block's other copies run on behind its attention.
STREAM_BUFFERS = (6, 4, 3, 2)
# Of the host's memory, what a streamed base leaves: for Python and its libraries, and the inputs that are sent there.
HOST_ROOM_BYTES = 2 * GIB


@dataclass(frozen=True)
class BasePlan:
    """Where the base is kept, and the peak that this has; all that there is to plan for drawing.

    Attributes:
        base_precision: nf4, or None for 16 bits (32 under --mixed_precision no).
        blocks: how many there are.
        streamed_blocks: the indices of those whose matrices visit the device from the host; none if all are there.
        buffers: for how many of their pieces there is room on the device.
        from_files: whether they come from the mapped weight files at each visit, as the host cannot hold them.
        host_bytes: of the host's memory, what is pinned for them.
        parts: the predicted peak in bytes, by part.
    """

    base_precision: BasePrecision | None
    blocks: int
    streamed_blocks: tuple[int, ...]
    buffers: int
    from_files: bool
    host_bytes: int
    parts: dict[str, int]

    @property
    def streamed(self) -> bool:
        """Whether any block's frozen matrices stay on the host and visit the device."""
        return bool(self.streamed_blocks)

    @property
    def leaves_blocks_unread(self) -> bool:
        """Whether what streams them reads them from the files. Of a base in 4 bits there is none."""
        return self.streamed and self.base_precision is None

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        return sum(self.parts.values())

    def sentence(self) -> str:
        """What is kept where, in words."""
        base = "in 4 bits (nf4)" if self.base_precision else "unchanged"
        if not self.streamed:
            return f"base {base}, on the device"
        source = "the weight files" if self.from_files else "host memory"
        held = f"{self.host_bytes / GIB:.1f} GiB pinned, {self.buffers} pieces on the device"
        some = len(self.streamed_blocks) < self.blocks
        which = f"{len(self.streamed_blocks)} of its {self.blocks} blocks " if some else ""
        return f"base {base}, {which}streamed from {source} piece by piece ({held})"


@dataclass(frozen=True)
class TrainingPlan(BasePlan):
    """What training keeps where.

    Attributes:
        recomputed: how many of the first blocks are computed anew in backward.
        offload_inputs: whether the recomputed blocks' inputs are sent to the host until backward.
        has_room_for_graph: whether the peak includes what recording a micro-step as a CUDA graph takes; else it may be
            recorded, or may not.
    """

    recomputed: int
    offload_inputs: bool
    has_room_for_graph: bool

    @property
    def modulated_ahead(self) -> list[int]:
        """The blocks that visit the device and are computed anew: for those there are `ModulationsAhead`."""
        return [block for block in self.streamed_blocks if block < self.recomputed]

    def sentence(self) -> str:
        """What is kept where, in words."""
        inputs = ", their inputs sent to the host" if self.offload_inputs else ""
        return f"{super().sentence()}; {self.recomputed} of {self.blocks} blocks computed anew in backward{inputs}"


_Plan = TypeVar("_Plan", bound=BasePlan)


def plain_plan(blocks: int, asked: AskedPrecision, all_recomputed: bool) -> TrainingPlan:
    """What is done where there is no budget: all on the device, and no more computed anew than asked for."""
    precision: BasePrecision | None = "nf4" if asked == "nf4" else None
    return TrainingPlan(precision, blocks, (), 0, False, 0, {}, blocks if all_recomputed else 0, False, True)


def plan_training(
    files: ModelFiles,
    shape: StepShape,
    budget: DeviceBudget,
    asked: AskedPrecision = "16bit",
    all_recomputed: bool = False,
    can_stream: bool = True,
) -> TrainingPlan:
    """The fastest plan that fits.

    Args:
        files: the model.
        shape: of the step.
        budget: to stay under.
        asked: 16bit for exact measures alone; nf4; or auto, which takes nf4 rather than stream the exact weights.
        all_recomputed: whether all blocks are to be computed anew (`--gradient_checkpointing`).
        can_stream: not with several processes.

    Raises:
        UserError: nothing fits; says the smallest budget that would do, and whether nf4 would.
    """
    for plan in each_plan(files, shape, budget, asked, all_recomputed, can_stream):
        if plan.peak_bytes <= budget.total_bytes:
            return plan
    smallest = enough_gib(plan.peak_bytes)
    remedy = f"type --vram_budget_gib {smallest}"
    if asked == "16bit":
        packed = each_plan(files, shape, budget, "nf4", all_recomputed, can_stream)
        if _first_that_fits(packed, budget):
            remedy = "add --base_precision nf4 (less exact), or give it more with --vram_budget_gib"
    raise BudgetTooSmall(
        f"{budget.total_bytes / GIB:.1f} GiB of GPU memory are too little, training takes at least "
        f"{smallest} GiB here: {remedy}, or lower --resolution or --train_batch_size",
        plan.peak_bytes,
    )


def _first_that_fits(plans: Iterable[_Plan], budget: DeviceBudget) -> _Plan | None:
    return next((plan for plan in plans if plan.peak_bytes <= budget.total_bytes), None)


class _Base(NamedTuple):
    """Where the base's weights are, first what a plan says of it, and how many bytes of them are on the device."""

    streamed_blocks: tuple[int, ...]
    buffers: int
    from_files: bool
    host_bytes: int
    device_bytes: int


def spread_streamed_blocks(count: int, staying: int) -> tuple[int, ...]:
    """Those of `count` blocks that visit the device where `staying` stay there.

    Spread evenly: while one that stays computes, a copy is under way.
    """
    return tuple(i for i in range(count) if (i + 1) * staying // count == i * staying // count)


class _Places:
    """Where a model's weights may be.

    Args:
        files: the model.
        dtype: of a base that is not in 4 bits.
        precision: nf4, or None.
        latent_size: height and width, in latent pixels.
    """

    def __init__(
        self, files: ModelFiles, dtype: torch.dtype, precision: BasePrecision | None, latent_size: tuple[int, int]
    ):
        config = files.read_config("transformer")
        self.blocks: int = config["num_layers"]
        self.costs = model_costs(config, dtype, precision)
        self.block_sizes = block_sizes(self.costs)
        self._whole = base_bytes(files, dtype, precision, latent_size)
        # No file holds 4-bit weights: they are made as they are loaded.
        self._may_be_in_files = precision is None
        self._host_bytes = available_host_bytes() - HOST_ROOM_BYTES

    def on_device(self) -> _Base:
        """All of them on the device."""
        return _Base((), 0, False, 0, self._whole)

    def streamed(self, staying: int, buffers: int) -> _Base:
        """So many blocks on the device, and of the others' matrices so many pieces, or all if there are fewer.

        All these are on the host or, if they are too many, in the files.
        """
        streamed_blocks = spread_streamed_blocks(self.blocks, staying)
        pieces = [piece.size for piece in self.costs if piece.block in streamed_blocks]
        from_files = self._may_be_in_files and pinned_bytes(pieces) > self._host_bytes
        pinned = pinned_bytes(ring_sizes(pieces) if from_files else pieces)
        count = min(buffers, len(pieces))
        return _Base(streamed_blocks, count, from_files, pinned, self._whole - sum(pieces) + count * max(pieces))


def _only_smaller(plans: Iterable[_Plan]) -> Iterator[_Plan]:
    """Those that take less than every plan before them: no budget has use for the others."""
    smallest = math.inf
    for plan in plans:
        if plan.peak_bytes < smallest:
            smallest = plan.peak_bytes
            yield plan


def plan_denoising(
    files: ModelFiles,
    shape: DenoisingShape,
    budget: DeviceBudget | None,
    asked: AskedPrecision = "16bit",
) -> BasePlan:
    """The fastest plan that fits; everything on the device where there is no budget.

    Args:
        files: the model.
        shape: of a forward.
        budget: to stay under.
        asked: as in `plan_training`.

    Raises:
        UserError: nothing fits; says the smallest budget that would do.
    """
    if budget is None:
        blocks = files.read_config("transformer")["num_layers"]
        return BasePlan("nf4" if asked == "nf4" else None, blocks, (), 0, False, 0, {})
    plans: list[BasePlan] = []
    for precision in _PRECISIONS[asked]:
        working = simulate_denoising(files.read_config("transformer"), shape, precision)
        places = _Places(files, shape.dtype, precision, shape.latent_size)
        bases = [places.on_device()]
        bases += [places.streamed(staying, STREAM_BUFFERS[0]) for staying in reversed(range(places.blocks))]
        bases += [places.streamed(0, buffers) for buffers in STREAM_BUFFERS[1:]]
        for base in bases:
            parts = {
                "CUDA": budget.context_bytes,
                "weights": base.device_bytes,
                "LoRA": shape.lora_bytes,
                "working memory": working + WORKSPACE_BYTES,
            }
            parts["unused between them"] = _unused(parts, bool(base.streamed_blocks))
            plans.append(BasePlan(precision, places.blocks, *base[:4], parts))
    # 4 bits on the device before the exact ones are streamed.
    plans = list(_only_smaller(sorted(plans, key=lambda plan: plan.streamed)))
    chosen = _first_that_fits(plans, budget)
    if chosen:
        return chosen
    smallest = enough_gib(plans[-1].peak_bytes)
    raise BudgetTooSmall(
        f"{budget.total_bytes / GIB:.1f} GiB of GPU memory are too little to denoise a picture, which takes at least "
        f"{smallest} GiB here: type --vram_budget_gib {smallest}, or a smaller --height, --width or --batch_size",
        plans[-1].peak_bytes,
    )


def each_plan(
    files: ModelFiles,
    shape: StepShape,
    budget: DeviceBudget,
    asked: AskedPrecision,
    all_recomputed: bool,
    can_stream: bool,
) -> Iterator[TrainingPlan]:
    """All plans that may be taken, the fastest first; each takes less than those before it.

    One after another: who has memory enough does not wait until the others are reckoned, and the GPU timed for them.
    """
    return _only_smaller(_all_plans(files, shape, budget, asked, all_recomputed, can_stream))


def _all_plans(
    files: ModelFiles,
    shape: StepShape,
    budget: DeviceBudget,
    asked: AskedPrecision,
    all_recomputed: bool,
    can_stream: bool,
) -> Iterator[TrainingPlan]:
    config = files.read_config("transformer")
    count: int = config["num_layers"]
    most = count if all_recomputed else count - 1
    counts = range(most if all_recomputed else 0, most + 1)
    planners: list[tuple[_Places, partial[TrainingPlan]]] = []
    for precision in _PRECISIONS[asked]:
        places = _Places(files, shape.dtype, precision, (shape.latent_side, shape.latent_side))
        plan = partial(_predict, simulate_step(config, shape, precision), shape, budget, precision)
        planners.append((places, plan))
        yield from (plan(places.on_device(), k) for k in counts)
        yield plan(places.on_device(), most, offload_inputs=True)
    if not can_stream:
        return
    size, rate = StepSize.of(config, shape), measure_flops_a_byte(budget.device, shape.dtype)
    for places, plan in planners:
        bases = [places.streamed(staying, STREAM_BUFFERS[0]) for staying in range(count)]
        computed = [computed_flops(places.costs, size, k) for k in counts]
        ways = []
        for base, (k, flops) in itertools.product(bases, zip(counts, computed, strict=True)):
            copied = copied_flops(places.block_sizes, base.streamed_blocks, k, base.from_files, rate)
            ways.append((StepCost(flops, copied).time, base, k))
        yield from (plan(base, k) for _, base, k in sorted(ways, key=lambda way: way[0]))
        smallest = [places.streamed(0, buffers) for buffers in STREAM_BUFFERS]
        yield from (plan(base, most, offload_inputs=True) for base in smallest)
        yield plan(smallest[-1], most, offload_inputs=True, room_for_graph=False)


def _predict(
    step: StepMemory,
    shape: StepShape,
    budget: DeviceBudget,
    precision: BasePrecision | None,
    base: _Base,
    recomputed: int,
    offload_inputs: bool = False,
    room_for_graph: bool = True,
) -> TrainingPlan:
    """The plan with its peak."""
    # Beside each parameter its gradient, and two moments of the optimizer; 8-bit ones take 2 bytes and their scales,
    # and in fp16 all that changes is there twice while a step may have to be undone.
    moments = 2.1 if shape.use_8bit_adam else 8
    undone = 4 + moments if shape.use_8bit_adam and shape.dtype == torch.float16 else 0
    of_a_parameter = 4 + 4 + moments + undone
    activations, working = step.peak(recomputed, offload_inputs)
    parts = {
        "CUDA": budget.context_bytes,
        "weights": base.device_bytes,
        "LoRA and optimizer": int(step.lora / 4 * of_a_parameter),
        "activations": activations,
        "working memory": working + WORKSPACE_BYTES,
    }
    # The allocator reuses the holes between activations, never all of them; fitted to what an H100 measured.
    fragments = int(0.08 * (activations + working) + 0.2 * parts["LoRA and optimizer"])
    if room_for_graph:
        fragments += GRAPH_UNUSED_BYTES + (OFFLOAD_UNUSED_BYTES if offload_inputs else 0)
    parts["unused between them"] = _unused(parts, bool(base.streamed_blocks)) + fragments
    return TrainingPlan(precision, len(step.kept), *base[:4], parts, recomputed, offload_inputs, room_for_graph)


def _unused(parts: Mapping[str, int], streamed: bool) -> int:
    return (2 if streamed else 1) * UNUSED_BYTES + int(UNUSED_SHARE * sum(parts.values()))
