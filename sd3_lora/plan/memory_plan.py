"""Which placement training and drawing take, so that they fit a budget; and its forecast in bytes.

The peak is the sum of CUDA's own memory, the base's weights, the LoRA with its gradients and optimizer, and the step:
the activations that are kept for backward and the working memory beside them (`step_memory.py`).

Of the measures that change no number, the fastest that fits is taken:

1. recompute k of the n blocks, as few as will do;
2. offload the blocks' inputs;
3. stream the matrices of blocks (`streaming.py`), of as few as will do, and recompute k: how many of each is decided
   by the time that the step computes and copies (`step_time.py`).

Weights in 4 bits change the numbers, and have to be asked for. Each field of a placement can be fixed by its flag; the
plan then chooses the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.memory import GIB, available_host_bytes
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.placement_flags import AskedPrecision
from sd3_lora.gpu.budget import BudgetTooSmall, DeviceBudget, at_most_gib, enough_gib
from sd3_lora.gpu.forecast import Forecast, Phase
from sd3_lora.gpu.pinned_memory import pinned_bytes
from sd3_lora.gpu.round_trips import Item, RoundTripBytes
from sd3_lora.plan.step_memory import (
    DenoisingShape,
    Step,
    StepMemory,
    StepShape,
    image_tokens,
    simulate_denoising,
    simulate_step,
)
from sd3_lora.plan.step_time import (
    BlockSize,
    PieceCost,
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
from sd3_lora.transformer.placement import AskedPlacement, Placement, spread_streamed_blocks
from sd3_lora.transformer.trained_clips import CLIP_BUFFERS

import torch

_PRECISIONS: dict[AskedPrecision, list[BasePrecision | None]] = {
    "16bit": [None],
    "nf4": ["nf4"],
    "auto": [None, "nf4"],
}
# cuBLAS keeps a workspace for the stream that multiplies, 32 MiB on Hopper and 8 MiB on others.
WORKSPACE_BYTES = 32 * 1024**2
# The allocator takes whole pages from the driver, and what lies between tensors stays unused; a second stream, which
# streaming copies on, takes further pages.
UNUSED_BYTES = 48 * 1024**2
# A captured step takes further pages, and more for the stream that offloads inputs.
GRAPH_UNUSED_BYTES = 8 * 1024**2
OFFLOAD_UNUSED_BYTES = 48 * 1024**2
UNUSED_SHARE = 0.005
# Of the working memory of a denoising step: 0.1 to 0.3 on an H200, for two to sixteen rows.
UNUSED_WORKING_SHARE = 0.25
# A trained number while pictures are drawn between the steps: itself, its gradient, and its copy in the base's dtype.
WHILE_DRAWING_BYTES = 10
# More pictures at a time than these are no faster.
MOST_TOGETHER = 4
# A forward of so many tokens, of pictures and prompts, fills a large GPU: four pictures of 1024 px under guidance. More
# are no faster; a streamed base has use for more.
FILLING_TOKENS = 36_000
MOST_DRAWN = 8
# Of what a step takes beside CUDA and the weights, what pictures between the steps may take: the forecast of that was
# up to a tenth too high on an H100 (`benchmarks/results/predictions-h100.json`).
DRAWN_SHARE = 0.9
_KEPT = ("CUDA", "weights", "CLIPs", "LoRA", "optimizer")  # of a phase of drawing: what is there whatever the batch
# For a streamed base: more than six gain nothing, since with six a block's other copies run behind its attention.
STREAM_BUFFERS = (6, 4, 3, 2)
# The host memory that a streamed base leaves free: for Python and its libraries, and for offloaded inputs.
HOST_ROOM_BYTES = 2 * GIB


@dataclass(frozen=True)
class Plan:
    """A placement with its forecast."""

    placement: Placement
    forecast: Forecast

    def base_sentence(self) -> str:
        """For the user: where the weights are, and how much host memory is pinned for them."""
        streams = self.placement.streamed or self.placement.clips_streamed
        pinned = f" ({self.forecast.host_bytes / GIB:.1f} GiB pinned)" if streams else ""
        return self.placement.base_sentence() + pinned

    def to_dict(self) -> dict[str, Any]:
        """For `run.json`: the placement's fields, and the bytes of pinned host memory."""
        return {**asdict(self.placement), "host_bytes": self.forecast.host_bytes}

    def sentence(self) -> str:
        """The whole plan, for the user."""
        place = self.placement
        return f"{self.base_sentence()}; {place.step_sentence()}{place.kernel_sentence()}"


@dataclass(frozen=True)
class DrawingBetween:
    """Pictures that are drawn between the steps: what they take at the least.

    Attributes:
        shape: of a forward for one row.
        rows: of a picture: two under guidance.
        decoding: bytes of decoding one, by part.
    """

    shape: DenoisingShape
    rows: int
    decoding: Mapping[str, int]


@dataclass(frozen=True)
class TrainingTask:
    """What is to be planned.

    Attributes:
        files: the model.
        shape: of the step.
        step: the step that will train, to be simulated.
        asked: what flags fix.
        can_stream: not with several processes, nor where gradients of all weights are kept.
        can_be_4bit: not with a LoRA that starts from the exact weights.
        drawing: what is drawn between the steps, if anything.
    """

    files: ModelFiles
    shape: StepShape
    step: Step
    asked: AskedPlacement = field(default_factory=AskedPlacement)
    can_stream: bool = True
    can_be_4bit: bool = True
    drawing: DrawingBetween | None = None


def plain_placement(files: ModelFiles, asked: AskedPlacement) -> Placement:
    """The placement without a budget: all on the device and nothing recomputed, but for what flags fix."""
    config = files.read_config("transformer")
    count: int = config["num_layers"]
    precision: BasePrecision | None = "nf4" if asked.precision == "nf4" else None
    streamed = spread_streamed_blocks(count, count - asked.streamed) if asked.streamed else ()
    costs = model_costs(config, torch.float32, precision) if streamed else []
    pieces = sum(piece.block in streamed for piece in costs)
    recomputed = asked.recomputed or (_recomputed_counts(asked, count)[-1] if asked.offload_inputs else 0)
    return Placement(
        count,
        precision,
        streamed,
        asked.stream_from or "host",
        min(asked.buffers or STREAM_BUFFERS[0], pieces),
        tuple(range(recomputed)),
        bool(asked.offload_inputs and recomputed),
        asked.modulations_ahead is not False,
        asked.attention_kernel,
        whole=asked.whole,
        clips_streamed=bool(asked.clips_streamed),
    )


def require_host_room(task: TrainingTask, plan: Plan) -> None:
    """Checks that the host has room for what of a trained transformer is streamed.

    Raises:
        UserError: it has not.
    """
    place, shape = plan.placement, task.shape
    if place.whole and place.streamed:
        places = _Places(task.files, shape.dtype, None, shape.enclosing_size, task.asked, shape.state_of)
        places.with_host_room([places.streamed(place.blocks - len(place.streamed), place.buffers)])


def plan_training(task: TrainingTask, budget: DeviceBudget) -> Plan:
    """The fastest plan that fits.

    Raises:
        UserError: nothing fits; names the smallest budget that would, and whether nf4 would.
    """
    chosen, smallest_bytes = _first_that_fits(each_plan(task, budget), budget)
    if chosen:
        return chosen
    smallest, asked = enough_gib(smallest_bytes), task.asked
    remedy = f"type --vram_budget_gib {smallest}"
    packed = replace(task, asked=replace(asked, precision="nf4"))
    may_be_packed = task.can_be_4bit and asked.precision == "16bit" and asked.stream_from != "files"
    if may_be_packed and _first_that_fits(each_plan(packed, budget), budget)[0]:
        remedy = "add --base_precision nf4 (less exact), or give it more with --vram_budget_gib"
    fixed = f" with {asked.typed}" if asked.typed else ""
    leave = f", or leave out {asked.typed}" if asked.typed else ""
    raise BudgetTooSmall(
        f"{at_most_gib(budget.total_bytes)} GiB of GPU memory are too little, training takes at least "
        f"{smallest} GiB here{fixed}: {remedy}, or lower --resolution or --train_batch_size{leave}",
        smallest_bytes,
    )


def plan_cheaper(task: TrainingTask, budget: DeviceBudget, plan: Plan, same_kernels: bool = False) -> Plan | None:
    """The fastest plan that fits and takes less than another, for a run whose numbers are to stay; None if none does.

    Args:
        task: of the run.
        budget: that is left.
        plan: of the run so far. The base's precision stays.
        same_kernels: whether its blocks are compiled, which streamed ones cannot be.
    """
    precision: AskedPrecision = "nf4" if plan.placement.precision == "nf4" else "16bit"
    task = replace(
        task, asked=replace(task.asked, precision=precision), can_stream=task.can_stream and not same_kernels
    )
    cheaper = (each for each in each_plan(task, budget) if each.forecast.peak_bytes < plan.forecast.peak_bytes)
    return _first_that_fits(cheaper, budget)[0]


def _first_that_fits(plans: Iterable[Plan], budget: DeviceBudget) -> tuple[Plan | None, int]:
    """The first plan within the budget, or None; and the smallest peak that was seen, in bytes."""
    smallest = 0
    for plan in plans:
        peak = plan.forecast.peak_bytes
        smallest = min(peak, smallest or peak)
        if peak <= budget.total_bytes:
            return plan, smallest
    return None, smallest


def drawn_together(task: TrainingTask, plan: Plan, most: int) -> int:
    """How many rows are denoised at a time between the steps: those of up to `most` pictures, so that the peak stays.

    Args:
        task: with what is drawn.
        plan: that was chosen for it; one without a forecast, as on a CPU, has room for four pictures.
        most: pictures.

    Returns:
        The rows of whole pictures; or 1, of which a picture under guidance has two.
    """
    assert task.drawing is not None
    per_picture, most = task.drawing.rows, min(most, MOST_TOGETHER)
    if not plan.forecast.phases:
        return most * per_picture
    config, place = task.files.read_config("transformer"), plan.placement
    kept = {name: size for name, size in plan.forecast.phases[-1].parts.items() if name in _KEPT}
    for count in range(most, 0, -1):
        shape = replace(task.drawing.shape, batch_size=count * per_picture)
        working = simulate_denoising(config, shape, place.precision, place.attention_kernel)
        if sum(_denoising_parts(kept, working, bool(place.streamed)).values()) <= room_to_draw(plan):
            return count * per_picture
    return 1


def room_to_draw(plan: Plan) -> int:
    """The bytes that pictures may take between the steps, with what is there anyway."""
    parts = plan.forecast.largest.parts
    known = parts["CUDA"] + parts["weights"] + parts.get("CLIPs", 0) + parts.get("optimizer", 0)
    return known + int(DRAWN_SHARE * (plan.forecast.peak_bytes - known))


def recompute_note(task: TrainingTask, budget: DeviceBudget | None) -> str:
    """The sentence that compares --gradient_checkpointing with the plan without it."""
    free = replace(task.asked, recomputed=None)
    plan = Plan(plain_placement(task.files, free), Forecast())
    if budget:
        plan = plan_training(replace(task, asked=free), budget)
    config, count = task.files.read_config("transformer"), plan.placement.blocks
    size = StepSize.of(config, task.shape)
    costs = model_costs(config, task.shape.dtype, plan.placement.precision)
    ratio = sum(computed_flops(costs, size, range(count))) / sum(computed_flops(costs, size, plan.placement.recomputed))
    peak = f" within {plan.forecast.peak_bytes / GIB:.2f} GiB" if budget else ""
    return (
        f"note: --gradient_checkpointing recomputes all {count} blocks. Without it {len(plan.placement.recomputed)} "
        f"would be{peak}, and a step would compute {1 - 1 / ratio:.0%} less"
    )


def plan_lines(task: TrainingTask, plan: Plan, budget: DeviceBudget | None, recomputes_all: bool) -> Iterator[str]:
    """What is planned, in words; and what a flag costs, or why it has no effect."""
    yield f"plan: {plan.sentence()}"
    if recomputes_all:
        yield recompute_note(task, budget)
    note = task.asked.without_effect(plan.placement)
    if note:
        yield note
    if budget:
        yield f"predicted peak: {plan.forecast.largest.sentence()}"
        yield from (f"to {phase.name}: {phase.sentence()}" for phase in plan.forecast.phases[1:])


@dataclass(frozen=True)
class _Base:
    """Where the base's weights are, in a placement with nothing else decided yet; and their bytes in each place.

    Attributes:
        placement: without what is recomputed.
        device_bytes: of weights on the device.
        host_bytes: of pinned memory.
        state_saved: bytes of the optimizer's state that are not on the device, since they are streamed too.
        clips_saved: bytes of the CLIPs that are not on the device, likewise.
    """

    placement: Placement
    device_bytes: int
    host_bytes: int
    state_saved: int = 0
    clips_saved: int = 0


class _Places:
    """Where a model's weights may be.

    Args:
        files: the model.
        dtype: of a base that is not in 4 bits.
        precision: nf4, or None.
        latent_size: height and width in which all pictures lie, in latent pixels.
        asked: what flags fix.
        state_of: the optimizer's state of a matrix with so many numbers, where that is streamed too.
    """

    def __init__(
        self,
        files: ModelFiles,
        dtype: torch.dtype,
        precision: BasePrecision | None,
        latent_size: tuple[int, int],
        asked: AskedPlacement,
        state_of: Callable[[int], Item] | None = None,
    ):
        self._state_of = state_of
        self._config, self._dtype, self._precision = files.read_config("transformer"), dtype, precision
        self.blocks: int = self._config["num_layers"]
        self._asked = asked
        ahead = asked.modulations_ahead is not False
        self._plain = Placement(
            self.blocks, precision, modulations_ahead=ahead, attention_kernel=asked.attention_kernel, whole=asked.whole
        )
        self._whole = base_bytes(files, dtype, precision, latent_size)
        self.host_room = available_host_bytes() - HOST_ROOM_BYTES

    @cached_property
    def costs(self) -> list[PieceCost]:
        """Of all pieces; only a streamed base asks for them, and they take a third of a second."""
        return model_costs(self._config, self._dtype, self._precision)

    @cached_property
    def block_sizes(self) -> list[BlockSize]:
        """Of all blocks."""
        return block_sizes(self.costs)

    def on_device(self) -> _Base:
        """All of them on the device."""
        return _Base(self._plain, self._whole, 0)

    @staticmethod
    def with_clips_streamed(base: _Base, pieces: Sequence[int]) -> _Base:
        """The same with the CLIPs streamed too, whose pieces have so many bytes; none where there are no pieces."""
        if not pieces:
            return base
        saved = sum(pieces) - min(CLIP_BUFFERS, len(pieces)) * max(pieces)
        on_host = base.host_bytes + pinned_bytes(pieces)
        return replace(
            base, placement=replace(base.placement, clips_streamed=True), host_bytes=on_host, clips_saved=saved
        )

    def streamed(self, resident: int, buffers: int, of_clips: Sequence[int] = ()) -> _Base:
        """`resident` blocks on the device, and room for `buffers` pieces of the others, or for all if there are fewer.

        The source is host memory or, if that is too small, the files. No file holds 4-bit weights, nor trained ones.

        Args:
            resident: number of blocks.
            buffers: on the device.
            of_clips: bytes of the CLIPs' pieces, where these are streamed too, from host memory.
        """
        blocks = spread_streamed_blocks(self.blocks, resident)
        costs = [piece for piece in self.costs if piece.block in blocks]
        pieces, state = [piece.size for piece in costs], RoundTripBytes()
        if self._state_of:
            state = RoundTripBytes.of([self._state_of(count) for piece in costs for count in piece.counts])
        may_be_files = self._plain.precision is None and not self._plain.whole
        beside = pinned_bytes(of_clips) if of_clips else 0
        is_too_much = may_be_files and pinned_bytes(pieces) + beside > self.host_room
        source = self._asked.stream_from or ("files" if is_too_much else "host")
        pinned = pinned_bytes(ring_sizes(pieces) if source == "files" else pieces)
        count = min(self._asked.buffers or buffers, len(pieces))
        placement = replace(self._plain, streamed=blocks, stream_from=source, buffers=count)
        on_device = self._whole - sum(pieces) + count * max(pieces)
        base = _Base(placement, on_device, pinned + state.pinned, state.whole - state.slots)
        return self.with_clips_streamed(base, of_clips)

    def with_host_room(self, bases: Sequence[_Base]) -> list[_Base]:
        """Those that the host has room for. Only of a trained transformer may there be none: others have the files.

        Raises:
            UserError: there is none.
        """
        if not self._plain.whole:
            return list(bases)
        fitting = [base for base in bases if base.host_bytes <= self.host_room]
        if not fitting:
            raise self.lacks_host(bases)
        return fitting

    def lacks_host(self, bases: Sequence[_Base]) -> UserError:
        """That the host has no room for what these keep there, the most of them."""
        most = max(base.host_bytes for base in bases)
        return UserError(
            f"--full with streamed blocks keeps their weights and the optimizer's state in {most / GIB:.1f} GiB of "
            f"host memory, of which {max(0, self.host_room) / GIB:.1f} GiB are free beside "
            f"{HOST_ROOM_BYTES / GIB:.0f} for the rest: close other programs, or leave more blocks on the GPU with a "
            "larger --vram_budget_gib or a smaller --stream_blocks"
        )

    def most_streamed(self, resident: Sequence[int], of_clips: Sequence[int] = ()) -> list[_Base]:
        """The most blocks streamed, with ever fewer buffers."""
        buffers = [self._asked.buffers] if self._asked.buffers else STREAM_BUFFERS
        return [self.streamed(min(resident), count, of_clips) for count in buffers]


def _only_smaller(plans: Iterable[Plan]) -> Iterator[Plan]:
    """Those with a smaller peak than every plan before them: no budget has use for the others."""
    smallest = math.inf
    for plan in plans:
        if plan.forecast.peak_bytes < smallest:
            smallest = plan.forecast.peak_bytes
            yield plan


def _resident_counts(asked: AskedPlacement, blocks: int) -> Sequence[int]:
    """How many blocks may stay on the device where others are streamed."""
    return range(blocks) if asked.streamed is None else [blocks - asked.streamed]


def plan_denoising(
    files: ModelFiles,
    shape: DenoisingShape,
    budget: DeviceBudget | None,
    asked: AskedPlacement | None = None,
    has_slack: bool = False,
) -> Plan:
    """The fastest plan that fits; everything on the device where there is no budget.

    Args:
        files: the model.
        shape: of a forward.
        budget: to stay under.
        asked: what flags fix.
        has_slack: whether there must be room for what the allocator leaves unused, with streamed weights too. Without
            it returns that and takes it again in each pass, and waits for the device.

    Raises:
        UserError: nothing fits; names the smallest budget that would.
    """
    asked = asked or AskedPlacement()
    if budget is None:
        placement = plain_placement(files, asked)
        return Plan(replace(placement, merged=shape.merging_bytes > 0 and placement.can_merge), Forecast())
    chosen, smallest_bytes = _first_that_fits(
        _only_smaller(_denoising_plans(files, shape, budget, asked, has_slack)), budget
    )
    if chosen:
        return chosen
    smallest = enough_gib(smallest_bytes)
    leave = f", or leave out {asked.typed}" if asked.typed else ""
    raise BudgetTooSmall(
        f"{at_most_gib(budget.total_bytes)} GiB of GPU memory are too little to denoise a picture, which takes at "
        f"least {smallest} GiB here: type --vram_budget_gib {smallest}, or a smaller --height, --width or "
        f"--batch_size{leave}",
        smallest_bytes,
    )


def _denoising_plans(
    files: ModelFiles, shape: DenoisingShape, budget: DeviceBudget, asked: AskedPlacement, has_slack: bool
) -> Iterator[Plan]:
    """All plans, the fastest first: 4 bits on the device before the exact ones are streamed."""
    config, found = files.read_config("transformer"), list[tuple[_Places, int]]()
    for precision in _PRECISIONS[asked.precision]:
        working = simulate_denoising(config, shape, precision, asked.attention_kernel)
        places = _Places(files, shape.dtype, precision, shape.latent_size, asked)
        found.append((places, working))
        if not asked.streamed:
            yield _denoising_plan(places.on_device(), shape, working, budget, has_slack)
    for places, working in found if asked.streamed != 0 else []:
        resident = _resident_counts(asked, places.blocks)
        bases = [places.streamed(count, STREAM_BUFFERS[0]) for count in reversed(resident)]
        for base in [*bases, *places.most_streamed(resident)[1:]]:
            yield _denoising_plan(base, shape, working, budget, has_slack)


def _denoising_plan(base: _Base, shape: DenoisingShape, working: int, budget: DeviceBudget, has_slack: bool) -> Plan:
    """The plan with its peak; LoRAs are merged where they can be."""
    merged, streamed = shape.merging_bytes > 0 and base.placement.can_merge, bool(base.placement.streamed)
    kept = {"CUDA": budget.context_bytes, "weights": base.device_bytes, "LoRA": 0 if merged else shape.lora_bytes}
    parts = _denoising_parts(kept, working, streamed, has_slack)
    is_captured = shape.captured and not streamed  # streamed weights are not captured
    parts["unused between them"] += GRAPH_UNUSED_BYTES if is_captured else 0
    phases = [Phase("denoise", parts)]
    if merged:
        merging = {**kept, "working memory": shape.merging_bytes}
        phases.append(Phase("merge the LoRA", {**merging, "unused between them": _unused(merging, streamed)}))
    return Plan(replace(base.placement, merged=merged), Forecast(tuple(phases), base.host_bytes))


def plan_drawing(
    files: ModelFiles, shape: DenoisingShape, budget: DeviceBudget, asked: AskedPlacement, most: int
) -> tuple[Plan, int]:
    """The plan with which pictures are drawn fastest, and how many of them are denoised together.

    Where the weights are on the device, as many as fill it. Where they are streamed, each pass serves all pictures of a
    batch, and what a larger batch takes of the budget leaves fewer blocks on the device: the best of both.

    Args:
        files: the model.
        shape: of a forward for one picture.
        budget: to stay under.
        asked: what flags fix.
        most: pictures that are to be drawn.

    Raises:
        UserError: not even one picture at a time fits.
    """
    config, dtype = files.read_config("transformer"), shape.dtype
    size = StepSize(
        shape.batch_size,
        image_tokens(config, shape.latent_size),
        shape.text_tokens,
        config["num_attention_heads"] * config["attention_head_dim"],
    )
    filled = max(1, FILLING_TOKENS // (size.rows * (size.tokens + size.text_tokens)))
    best: tuple[float, Plan, int] | None = None
    for count in sorted(range(1, min(most, MOST_DRAWN) + 1), key=lambda count: (count > filled, abs(count - filled))):
        together = replace(shape, batch_size=count * shape.batch_size)
        try:
            plan = plan_denoising(files, together, budget, asked, has_slack=True)
        except BudgetTooSmall:
            if count > 1:
                continue
            plan = plan_denoising(files, together, budget, asked)
        place = plan.placement
        if not place.streamed:
            return plan, count
        few_buffers = len(place.streamed) == place.blocks and place.buffers < (asked.buffers or STREAM_BUFFERS[0])
        if count > 1 and few_buffers:
            continue
        costs = model_costs(config, dtype, place.precision)
        computed = count * computed_flops(costs, size, ()).forward
        rate = measure_flops_a_byte(budget.device, dtype)
        time = max(computed, copied_flops(block_sizes(costs), place, rate).forward) / count
        if best is None or time < best[0]:
            best = time, plan, count
    assert best is not None
    return best[1:]


def plan_beside(plan: Plan, decoding: Mapping[str, int], budget: DeviceBudget) -> Phase | None:
    """The phase in which pictures are decoded beside the transformer; None where there is no room for both.

    Args:
        plan: of denoising.
        decoding: what the VAE takes alone, by part.
        budget: to stay under.
    """
    parts = {"VAE": decoding["VAE"], "decoding": decoding["working memory"]}
    phase = Phase("decode beside the transformer", {**plan.forecast.phases[0].parts, **parts})
    return phase if phase.peak_bytes <= budget.total_bytes else None


def each_plan(task: TrainingTask, budget: DeviceBudget) -> Iterator[Plan]:
    """All plans that may be taken, the fastest first; each has a smaller peak than those before it.

    A generator: where an early plan fits, the later ones are not computed, and the GPU is not timed for them.

    Raises:
        UserError: at the end, where a trained transformer is streamed and the host has no room for more blocks of it.
    """
    return _only_smaller(_all_plans(task, budget))


def _all_plans(task: TrainingTask, budget: DeviceBudget) -> Iterator[Plan]:
    asked, shape, config = task.asked, task.shape, task.files.read_config("transformer")
    count: int = config["num_layers"]
    counts = _recomputed_counts(asked, count)
    planners: list[tuple[_Places, _Planner]] = []
    for precision in _PRECISIONS[asked.precision]:
        places = _Places(task.files, shape.dtype, precision, shape.enclosing_size, asked, shape.state_of)
        memory = simulate_step(config, shape, precision, task.step, asked.attention_kernel)
        drawing = task.drawing
        working = drawing and simulate_denoising(config, drawing.shape, precision, asked.attention_kernel)
        planner = _Planner(memory, shape, budget, working or 0, drawing.decoding if drawing else {})
        planners.append((places, planner))
        if not asked.streamed:
            base = places.with_clips_streamed(places.on_device(), memory.clip_pieces if asked.clips_streamed else ())
            whole = (
                replace(planner, memory=memory.compiled(config)) if shape.compiled and precision is None else planner
            )
            yield from (whole.plan(base, k, offload) for offload, k in _recomputing(asked, counts))
    if not task.can_stream or asked.streamed == 0:
        return
    size, rate = StepSize.of(config, shape), measure_flops_a_byte(budget.device, shape.dtype)
    # The CLIPs compute too little to hide their copies: they are streamed last.
    of_clips = () if asked.clips_streamed is False else planners[0][1].memory.clip_pieces
    may_stay = [()] if of_clips and not asked.clips_streamed else []
    for (places, planner), pieces in itertools.product(planners, [*may_stay, of_clips]):
        resident = _resident_counts(asked, count)
        every = [places.streamed(staying, STREAM_BUFFERS[0], pieces) for staying in resident]
        bases = places.with_host_room(every)
        computed = {k: computed_flops(places.costs, size, range(k)) for k in counts}
        ways: list[tuple[tuple[float, float], _Base, int]] = []
        for base, k in itertools.product(bases, counts):
            copied = copied_flops(places.block_sizes, _recompute(base.placement, k), rate, shape.base_rows > 0)
            ways.append((StepCost(computed[k], copied).time, base, k))
        if not asked.offload_inputs:
            yield from (planner.plan(base, k) for _, base, k in sorted(ways, key=lambda way: way[0]))
        if pieces != of_clips:
            continue
        offload = asked.offload_inputs is not False and max(counts) > 0
        fitting = [base.placement.blocks - len(base.placement.streamed) for base in bases]
        smallest = places.most_streamed(fitting, pieces)
        yield from (planner.plan(base, max(counts), offload) for base in smallest)
        yield planner.plan(smallest[-1], max(counts), offload, room_for_graph=False)
        if len(bases) < len(every):  # more blocks would be streamed, were there room for them
            raise places.lacks_host(every)


def _recomputed_counts(asked: AskedPlacement, blocks: int) -> Sequence[int]:
    """How many blocks may be recomputed.

    Not all of them: to recompute the last one too saves nothing (see `recompute_blocks`). Nor one alone where inputs
    must be offloaded, since the last recomputed block's stays.
    """
    if asked.recomputed is not None:
        return [asked.recomputed]
    return range(2, max(3, blocks)) if asked.offload_inputs else range(blocks)


def _recomputing(asked: AskedPlacement, counts: Sequence[int]) -> Iterator[tuple[bool, int]]:
    """Whether inputs are offloaded, and how many blocks are recomputed: the fastest first."""
    if not asked.offload_inputs:
        yield from ((False, k) for k in counts)
    if asked.offload_inputs is not False:
        yield from ((True, k) for k in (counts if asked.offload_inputs else [max(counts)]) if k)


def _recompute(placement: Placement, count: int) -> Placement:
    return replace(placement, recomputed=tuple(range(count)))


@dataclass(frozen=True)
class _Planner:
    """Forecasts placements of one model in one precision.

    Attributes:
        memory: of a step.
        shape: of a step.
        budget: whose own part is counted.
        denoising: working memory of a forward that draws between the steps; 0 where nothing is drawn.
        decoding: what the VAE takes then, by part.
    """

    memory: StepMemory
    shape: StepShape
    budget: DeviceBudget
    denoising: int = 0
    decoding: Mapping[str, int] = field(default_factory=dict)

    def plan(self, base: _Base, recomputed: int, offload_inputs: bool = False, room_for_graph: bool = True) -> Plan:
        """The plan with its peak."""
        placement = replace(_recompute(base.placement, recomputed), offload_inputs=offload_inputs)
        activations, working = self.memory.peak(placement.recomputed, offload_inputs)
        parts = {
            "CUDA": self.budget.context_bytes,
            "weights": base.device_bytes,
            **self._clips(base),
            **self._updated(base),
            "activations": activations,
            "working memory": working + WORKSPACE_BYTES,
        }
        # The allocator reuses the holes between activations, never all of them; fitted to measurements on an H100.
        fragments = int(0.08 * (activations + working) + 0.2 * parts.get("LoRA and optimizer", 0))
        if room_for_graph:
            fragments += GRAPH_UNUSED_BYTES + (OFFLOAD_UNUSED_BYTES if offload_inputs else 0)
        parts["unused between them"] = _unused(parts, bool(placement.streamed)) + fragments
        phases = Phase("step", parts), *self._between(base)
        return Plan(placement, Forecast(phases, base.host_bytes, room_for_graph))

    def _updated(self, base: _Base) -> dict[str, int]:
        """The LoRA with its optimizer's state, or that of the whole transformer's."""
        if self.shape.whole_bytes is not None:
            return {"optimizer": self.shape.whole_bytes - base.state_saved}
        return {"LoRA and optimizer": int(self.memory.lora / 4 * self.shape.bytes_per_parameter)}

    def _clips(self, base: _Base) -> dict[str, int]:
        return {"CLIPs": self.memory.clips - base.clips_saved} if self.memory.clips else {}

    def _between(self, base: _Base) -> Iterator[Phase]:
        """The phases of saving a whole transformer; and of drawing between the steps, while a LoRA's optimizer's state
        waits on the host.
        """
        if self.shape.whole:  # to be saved, tensors leave the device one at a time
            kept = {"CUDA": self.budget.context_bytes, "weights": base.device_bytes, **self._updated(base)}
            yield Phase("save", {**kept, "unused between them": _unused(kept, False)})
        if not self.denoising:
            return
        per_parameter = WHILE_DRAWING_BYTES + 1.5 * self.shape.kind.frozen_bytes_per_parameter
        kept = {
            "CUDA": self.budget.context_bytes,
            "weights": base.device_bytes,
            **self._clips(base),
            "LoRA": int(self.memory.lora / 4 * per_parameter),
            **(self._updated(base) if self.shape.whole else {}),
        }
        streamed = bool(base.placement.streamed)
        yield Phase("denoise a validation picture", _denoising_parts(kept, self.denoising, streamed))
        parts = {**kept, **self.decoding}
        yield Phase("decode a validation picture", {**parts, "unused between them": _unused(parts, streamed)})


def _denoising_parts(kept: Mapping[str, int], working: int, streamed: bool, has_slack: bool = False) -> dict[str, int]:
    """Bytes by part of a forward that draws, beside what is there anyway."""
    parts = {**kept, "working memory": working + WORKSPACE_BYTES}
    # A streamed base is there because the budget is small, and then the allocator gives back what is unused.
    fragments = 0 if streamed and not has_slack else int(UNUSED_WORKING_SHARE * working)
    return {**parts, "unused between them": _unused(parts, streamed) + fragments}


def _unused(parts: Mapping[str, int], streamed: bool) -> int:
    return (2 if streamed else 1) * UNUSED_BYTES + int(UNUSED_SHARE * sum(parts.values()))
