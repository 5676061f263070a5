"""The memory plan: what it predicts is what runs, it grows with the budget, and every plan trains to the same bits."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import BudgetConfig
from sd3_lora.common.memory import GIB, drop_workspaces
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.placement_flags import AskedPrecision
from sd3_lora.gpu.budget import (
    ASSUMED_CONTEXT_BYTES,
    _context_bytes,
    at_most_gib,
    driver_bytes,
    enough_gib,
    open_budget,
    sentence,
)
from sd3_lora.gpu.forecast import Forecast
from sd3_lora.gpu.pinned_memory import pinned_bytes
from sd3_lora.plan import memory_plan
from sd3_lora.plan.memory_plan import (
    DrawingBetween,
    Plan,
    drawn_together,
    plan_beside,
    plan_denoising,
    plan_drawing,
    plan_training,
)
from sd3_lora.plan.step_memory import DenoisingShape, StepShape, simulate_step
from sd3_lora.plan.step_time import (
    PieceCost,
    StepCost,
    StepSize,
    block_sizes,
    computed_flops,
    copied_flops,
    model_costs,
)
from sd3_lora.transformer.placement import AskedPlacement, Placement, spread_streamed_blocks

import pytest
import torch
from conftest import PROJECT
from miniature_plans import STEP, budget_of, list_plans, task_of
from small_transformer import CPU, GPU, needs_gpu

MIB = 1024**2
SHAPE = StepShape(2, (8, 8), 97, None, None, 4, 0.0, torch.float16, 16)


# The plan


def time_of(placement: Placement, costs: list[PieceCost], size: StepSize) -> tuple[float, float]:
    """What its place in the order is by."""
    copied = copied_flops(block_sizes(costs), placement)
    return StepCost(computed_flops(costs, size, placement.recomputed), copied).time


def peaks_of(plans: list[Plan]) -> list[int]:
    return [plan.forecast.peak_bytes for plan in plans]


@pytest.mark.parametrize("asked", ["16bit", "nf4", "auto"])
@pytest.mark.usefixtures("without_allowances")
def test_more_budget_is_never_a_slower_plan(miniature_files: ModelFiles, asked: AskedPrecision) -> None:
    task = task_of(miniature_files, SHAPE, precision=asked)
    plans = list_plans(task)
    peaks = sorted(peaks_of(plans))
    places = []
    for size in range(peaks[0], peaks[-1] + 1, (peaks[-1] - peaks[0]) // 40):
        chosen = plan_training(task, budget_of(size))
        assert chosen.forecast.peak_bytes <= size
        places.append(plans.index(chosen))
    assert places == sorted(places, reverse=True)
    assert len(set(places)) > 5


@pytest.mark.usefixtures("without_allowances")
def test_exact_measures_come_in_the_order_of_their_speed(miniature_files: ModelFiles) -> None:
    """On the device, recomputing more and more blocks; then streaming some and recomputing some; the last resorts."""
    plans = list_plans(task_of(miniature_files, SHAPE))
    places = [plan.placement for plan in plans]
    assert all(place.precision is None for place in places)
    resident = [place for place in places if not place.streamed]
    assert places[: len(resident)] == resident
    assert [place.recomputed for place in resident] == [tuple(range(count)) for count in (0, 1, 2, 3, 4, 5, 5)]
    assert [place.offload_inputs for place in resident] == [False] * 6 + [True]
    assert peaks_of(plans) == sorted(set(peaks_of(plans)), reverse=True)

    mixed, last = places[len(resident) : -5], places[-5:]
    assert [place.buffers for place in mixed] == [6] * len(mixed)
    config = miniature_files.read_config("transformer")
    costs, size = model_costs(config, torch.float16, None), StepSize.of(config, SHAPE)
    times = [time_of(place, costs, size) for place in mixed]
    assert times == sorted(times)
    ways = {(place.streamed, place.recomputed) for place in mixed}
    assert len({way[0] for way in ways}) > 4
    assert len({way[1] for way in ways}) > 2
    assert len(mixed) == len(ways) > 10

    assert {(place.streamed, place.recomputed) for place in last} == {(tuple(range(6)), tuple(range(5)))}
    assert [place.buffers for place in last] == [6, 4, 3, 2, 2]
    assert [place.offload_inputs for place in last] == [True] * 5
    assert [plan.forecast.has_room_for_graph for plan in plans] == [True] * (len(plans) - 1) + [False]
    everywhere = list_plans(task_of(miniature_files, SHAPE, recomputed=6))
    assert {plan.placement.recomputed for plan in everywhere} == {tuple(range(6))}
    in_several_processes = list_plans(task_of(miniature_files, SHAPE, can_stream=False), budget_of(1))
    assert not any(plan.placement.streamed for plan in in_several_processes)


@pytest.mark.usefixtures("without_allowances")
def test_no_plan_is_left_out_that_a_budget_has_use_for(miniature_files: ModelFiles) -> None:
    """Of all pairs of streamed and recomputed blocks, for any budget the fastest that fits is listed."""
    plans = [plan for plan in list_plans(task_of(miniature_files, SHAPE)) if plan.placement.streamed]
    config = miniature_files.read_config("transformer")
    costs, size = model_costs(config, torch.float16, None), StepSize.of(config, SHAPE)
    planner = planner_of(miniature_files)
    places = places_of(miniature_files)
    pairs = []
    for staying, k in itertools.product(range(6), range(6)):
        plan = planner.plan(places.streamed(staying, 6), k)
        pairs.append((time_of(plan.placement, costs, size), plan.forecast.peak_bytes))
    for budget in sorted(peak for _, peak in pairs if peak < plans[0].forecast.peak_bytes):
        fastest = min(time for time, peak in pairs if peak <= budget)
        listed = next(plan for plan in plans if plan.forecast.peak_bytes <= budget)
        assert time_of(listed.placement, costs, size) == fastest


def places_of(files: ModelFiles) -> memory_plan._Places:
    return memory_plan._Places(files, torch.float16, None, (8, 8), AskedPlacement())


def planner_of(files: ModelFiles) -> memory_plan._Planner:
    memory = simulate_step(files.read_config("transformer"), SHAPE, None, STEP)
    return memory_plan._Planner(memory, SHAPE, budget_of(1 << 40))


@pytest.mark.parametrize(("was_there", "gib"), [(False, 0.5), (True, 0.75)])
def test_a_context_that_was_there_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, was_there: bool, gib: float
) -> None:
    """As in a process of several, which has chosen its GPU before; what it adds now would be far too little."""
    used = iter([int(3 * GIB), int((3.15 if was_there else 3.5) * GIB)])
    monkeypatch.setattr("sd3_lora.gpu.budget._CONTEXTS", {})
    monkeypatch.setattr("sd3_lora.gpu.budget.driver_bytes", lambda index: next(used))
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: was_there, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    assert _context_bytes(torch.device("cpu", 0)) == int(gib * GIB)


class Nvml:
    """The driver's library, of a GPU with three gibibytes in use."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, identity: bytes, handle: object) -> int:
        return 0 if identity == b"GPU-an-id" else 1

    def nvmlDeviceGetMemoryInfo(self, handle: object, memory: Any) -> int:
        memory._obj.used = 3 * GIB
        return 0


@pytest.mark.parametrize(("platform", "library"), [("win32", "nvml.dll"), ("linux", "libnvidia-ml.so.1")])
def test_the_driver_is_asked_by_the_system_s_name_of_its_library(
    monkeypatch: pytest.MonkeyPatch, platform: str, library: str
) -> None:
    def load(name: str) -> Nvml:
        if name != library:
            raise OSError(f"there is no {name}")
        return Nvml()

    monkeypatch.setattr("sd3_lora.gpu.budget.sys.platform", platform)
    monkeypatch.setattr("sd3_lora.gpu.budget.ctypes.CDLL", load)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="an-id"))
    assert driver_bytes(0) == 3 * GIB


@needs_gpu
def test_opening_a_budget_leaves_nothing_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even cuBLAS's workspace of a stream on which a captured step does not compute."""
    monkeypatch.setattr("sd3_lora.gpu.budget._CONTEXTS", {})
    drop_workspaces(GPU)
    before = torch.cuda.memory_allocated()
    assert open_budget(BudgetConfig(), GPU)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(("offload", "mib"), [(False, 8), (True, 8 + 48)])
def test_a_graph_takes_memory_of_its_own(miniature_files: ModelFiles, offload: bool, mib: int) -> None:
    base, planner = places_of(miniature_files).streamed(0, 2), planner_of(miniature_files)
    with_it, without = (planner.plan(base, 5, offload, room).forecast.peak_bytes for room in (True, False))
    assert with_it - without == mib * 1024**2


@pytest.mark.usefixtures("without_allowances")
def test_a_fast_gpu_keeps_blocks_and_a_slow_one_activations(
    miniature_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a copy costs, counted in FLOPs, is the GPU's own; of the same memory they make different use."""
    staying, recomputed = [], []
    task = task_of(miniature_files, SHAPE)
    exact = list_plans(task)
    streamed = [plan for plan in exact if plan.placement.streamed and not plan.placement.offload_inputs]
    for rate in (1, 10, 20, 40, 1000):
        measure = MagicMock(return_value=rate)
        monkeypatch.setattr(memory_plan, "measure_flops_a_byte", measure)
        places = [plan_training(task, budget_of(size)).placement for size in peaks_of(streamed)]
        staying.append(sum(place.blocks - len(place.streamed) for place in places))
        recomputed.append(sum(len(place.recomputed) for place in places))
        measure.assert_called_with(CPU, torch.float16)
        measure.reset_mock()
        plan_training(task, budget_of(max(peaks_of(exact))))
        measure.assert_not_called()  # all is on the device
    assert staying == sorted(staying)
    assert recomputed == sorted(recomputed)
    assert staying[0] < staying[-1]
    assert recomputed[0] < recomputed[-1]


@pytest.mark.parametrize("count", [1, 6, 24, 38])
def test_the_blocks_that_stay_are_spread(count: int) -> None:
    assert spread_streamed_blocks(count, 0) == tuple(range(count))
    for staying in range(count):
        streamed_blocks = spread_streamed_blocks(count, staying)
        assert len(streamed_blocks) == count - staying
        runs = "".join("v" if i in streamed_blocks else " " for i in range(count)).split()
        assert max(map(len, runs)) - min(map(len, runs[:-1] or runs)) <= 1


@pytest.mark.usefixtures("without_allowances")
def test_auto_takes_4_bits_rather_than_stream(miniature_files: ModelFiles) -> None:
    places = [plan.placement for plan in list_plans(task_of(miniature_files, SHAPE, precision="auto"))]
    kinds = list(dict.fromkeys((bool(place.streamed), place.precision) for place in places))
    assert kinds == [(False, None), (False, "nf4"), (True, None), (True, "nf4")]


def test_where_nothing_fits_the_sentence_names_what_would(miniature_files: ModelFiles) -> None:
    with pytest.raises(UserError) as error:
        plan_training(task_of(miniature_files, SHAPE), budget_of(GIB // 2))
    asked = re.search(r"--vram_budget_gib ([\d.]+)", str(error.value))
    assert asked, error.value
    assert plan_training(task_of(miniature_files, SHAPE), budget_of(int(float(asked[1]) * GIB)))
    with pytest.raises(
        UserError, match=r"denoise a picture, which takes at least [\d.]+ GiB here: type --vram_budget_gib"
    ):
        plan_denoising(miniature_files, DenoisingShape(2, (16, 16), 154, torch.float16, 0), budget_of(GIB // 2))


@pytest.mark.usefixtures("without_allowances")
def test_4_bits_are_offered_where_they_would_do(miniature_files: ModelFiles) -> None:
    exact, packed = (
        min(peaks_of(list_plans(task_of(miniature_files, SHAPE, precision=asked), budget_of(1))))
        for asked in ("16bit", "nf4")
    )
    assert packed < exact
    with pytest.raises(UserError, match="add --base_precision nf4"):
        plan_training(task_of(miniature_files, SHAPE), budget_of(packed))


@pytest.mark.usefixtures("without_allowances")
def test_drawing_streams_where_the_base_does_not_fit(miniature_files: ModelFiles) -> None:
    shape = DenoisingShape(2, (16, 16), 154, torch.float32, 0)
    resident = plan_denoising(miniature_files, shape, budget_of(1 << 40))
    assert not resident.placement.streamed
    peak_bytes = resident.forecast.peak_bytes
    plan = plan_denoising(miniature_files, shape, budget_of(peak_bytes - 1))
    assert plan.forecast.peak_bytes < peak_bytes
    assert 0 < len(plan.placement.streamed) < 6
    costs = model_costs(miniature_files.read_config("transformer"), torch.float32, None)
    found = []
    while plan.placement.buffers > 2:
        streamed, buffers = plan.placement.streamed, plan.placement.buffers
        found.append((len(streamed), buffers))
        pieces = [piece.size for piece in costs if piece.block in streamed]
        saved = resident.forecast.largest.parts["weights"] - plan.forecast.largest.parts["weights"]
        assert saved == sum(pieces) - buffers * max(pieces)
        plan = plan_denoising(miniature_files, shape, budget_of(plan.forecast.peak_bytes - 1))
    assert found == [*((count, 6) for count in range(found[0][0], 7)), (6, 4), (6, 3)]
    assert plan_denoising(miniature_files, shape, None).forecast.largest.parts == {}
    packed = plan_denoising(miniature_files, shape, budget_of(1 << 40), AskedPlacement("nf4"))
    assert packed.forecast.peak_bytes < peak_bytes


@pytest.mark.usefixtures("without_allowances")
def test_a_merged_lora_takes_memory_only_while_it_is_merged(miniature_files: ModelFiles) -> None:
    """Beside the weights it takes its own in every forward; and where weights cannot be changed."""

    def planned(asked: AskedPlacement | None = None, budget: int = 1 << 40, **more: int) -> Plan:
        shape = DenoisingShape(2, (16, 16), 154, torch.float32, **{"lora_bytes": 10 * MIB, **more})
        return plan_denoising(miniature_files, shape, budget_of(budget), asked)

    beside, merged = planned(), planned(merging_bytes=4 * MIB)
    assert not beside.placement.merged
    assert merged.placement.merged
    assert [phase.name for phase in merged.forecast.phases] == ["denoise", "merge the LoRA"]
    assert beside.forecast.phases[0].parts["LoRA"] - merged.forecast.phases[0].parts["LoRA"] == 10 * MIB
    large = planned(merging_bytes=900 * MIB)
    assert large.forecast.largest.name == "merge the LoRA"
    assert large.forecast.peak_bytes - merged.forecast.phases[1].peak_bytes >= 896 * MIB
    streamed = AskedPlacement(streamed=6)
    assert planned(streamed, merging_bytes=1).placement.merged
    assert not planned(replace(streamed, stream_from="files"), merging_bytes=1).placement.merged
    assert not planned(AskedPlacement("nf4"), merging_bytes=1).placement.merged
    assert plan_denoising(miniature_files, DenoisingShape(2, (16, 16), 154, torch.float32, 0, 1), None).placement.merged


@pytest.mark.usefixtures("without_allowances")
def test_as_many_pictures_are_drawn_together_as_are_fastest(
    miniature_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = DenoisingShape(2, (16, 16), 154, torch.float32, 0)
    rows = 2 * (64 + 154)

    def together(budget: int, most: int = 99, asked: AskedPlacement | None = None) -> tuple[int, Plan]:
        plan, count = plan_drawing(miniature_files, shape, budget_of(budget), asked or AskedPlacement(), most)
        return count, plan

    monkeypatch.setattr(memory_plan, "FILLING_TOKENS", 5 * rows)
    assert together(1 << 40)[0] == 5  # a GPU is full
    assert together(1 << 40, most=3)[0] == 3
    of_five = plan_denoising(miniature_files, replace(shape, batch_size=10), budget_of(1 << 40)).forecast.peak_bytes
    count, plan = together(of_five - 1)
    assert count < 5
    assert not plan.placement.streamed
    # All streamed, the copies are what takes time: each pass serves as many as may be.
    monkeypatch.setattr(memory_plan, "measure_flops_a_byte", lambda *_: 1e9)
    assert together(1 << 40, asked=AskedPlacement(streamed=6))[0] == memory_plan.MOST_DRAWN
    monkeypatch.setattr(memory_plan, "measure_flops_a_byte", lambda *_: 1e-9)
    assert together(1 << 40, asked=AskedPlacement(streamed=6))[0] == 5
    # With all buffers, and with room for what the allocator leaves unused.
    three = plan_denoising(
        miniature_files, replace(shape, batch_size=6), budget_of(1 << 40), AskedPlacement(streamed=6)
    )
    count, plan = together(three.forecast.peak_bytes, asked=AskedPlacement(streamed=6))
    assert 1 < count < 3
    assert plan.placement.buffers == 6
    with pytest.raises(UserError, match="are too little to denoise a picture"):
        together(GIB // 2)


def test_pictures_are_decoded_beside_the_transformer_where_both_fit(miniature_files: ModelFiles) -> None:
    budget = budget_of(2 * GIB)
    plan = plan_denoising(miniature_files, DenoisingShape(2, (16, 16), 154, torch.float32, 0), budget)
    free = budget.total_bytes - plan.forecast.phases[0].peak_bytes
    phase = plan_beside(plan, {"CUDA": GIB, "VAE": free // 2, "working memory": free - free // 2}, budget)
    assert phase is not None
    assert phase.peak_bytes == budget.total_bytes
    assert plan_beside(plan, {"CUDA": GIB, "VAE": free // 2, "working memory": free}, budget) is None


def test_what_is_too_little_reads_less_than_what_is_enough() -> None:
    assert [at_most_gib(int(typed * GIB)) for typed in (0.8, 1, 7.96)] == ["0.80", "1.00", "7.96"]  # as typed
    for needed in (GIB, GIB * 4 // 5, GIB * 3 // 7):
        assert float(at_most_gib(needed - 1)) < float(enough_gib(needed))
        assert float(enough_gib(needed)) * GIB >= needed


@pytest.mark.usefixtures("without_allowances")
def test_a_host_that_is_too_small_streams_from_the_files(
    miniature_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = model_costs(miniature_files.read_config("transformer"), torch.float16, None)
    pieces = [piece.size for piece in costs]
    enough = pinned_bytes(pieces) + memory_plan.HOST_ROOM_BYTES

    def plans(available: int, asked: AskedPrecision = "auto") -> list[Plan]:
        monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: available)
        shape = DenoisingShape(2, (16, 16), 154, torch.float16, 0)
        drawing = plan_denoising(miniature_files, shape, budget_of(1 << 40))
        return [*list_plans(task_of(miniature_files, SHAPE, precision=asked)), drawing]

    def own_bytes(plan: Plan) -> int:
        return pinned_bytes([piece.size for piece in costs if piece.block in plan.placement.streamed])

    def is_exact_and_streamed(plan: Plan) -> bool:
        return bool(plan.placement.streamed) and plan.placement.precision is None

    def from_files(plan: Plan) -> bool:
        return plan.placement.stream_from == "files"

    large, small, between = plans(enough), plans(0), plans(enough - 1, "16bit")
    assert not any(map(from_files, large))
    for plan in (*small, *between):
        exact = is_exact_and_streamed(plan)
        assert from_files(plan) == (exact and (plan in small or own_bytes(plan) == pinned_bytes(pieces)))
        assert from_files(plan) or not exact or plan.forecast.host_bytes == own_bytes(plan)
    assert {from_files(plan) for plan in between if is_exact_and_streamed(plan)} == {True, False}
    assert large[-2].forecast.phases == small[-2].forecast.phases  # of the device's memory the host changes nothing
    (*_, plan) = (plan for plan in large[:-1] if is_exact_and_streamed(plan))
    assert plan.forecast.host_bytes == pinned_bytes(pieces)
    assert plan.sentence().startswith(
        "base unchanged, streamed from host memory, 2 pieces on the device (0.0 GiB pinned); "
    )
    some = next(plan for plan in between if plan.placement.streamed)
    assert some.sentence().startswith("base unchanged, 2 of its 6 blocks streamed from host memory, 6 pieces on ")
    (*_, plan) = (plan for plan in small[:-1] if from_files(plan))
    assert plan.forecast.host_bytes == pinned_bytes(3 * [max(pieces)])
    assert plan.sentence().startswith(
        "base unchanged, streamed from the weight files, 2 pieces on the device (0.0 GiB pinned); "
    )
    assert {plan.forecast.host_bytes for plan in large if not plan.placement.streamed} == {0}


# The budget


def test_a_budget_on_a_cpu_is_planned_as_on_a_gpu() -> None:
    assert open_budget(BudgetConfig(), CPU) is None
    budget = open_budget(BudgetConfig(8.0), CPU)
    assert budget is not None
    assert budget.tensor_bytes == 8 * GIB - ASSUMED_CONTEXT_BYTES
    assert budget.used_bytes([]) == 0
    with pytest.raises(UserError, match=r"--vram_budget_gib 0.5: CUDA itself takes 0.75 GiB: ask for more"):
        open_budget(BudgetConfig(0.5), CPU)
    with pytest.raises(ValueError, match="must be a positive number"):
        BudgetConfig(-1.0)
    assert sentence({"weights": GIB, "nothing": 0, "rest": GIB // 2}) == "weights 1.00 + rest 0.50 = 1.50 GiB"


# What was measured


def test_the_predictions_of_training_were_within_8_percent_of_what_was_measured() -> None:
    results = [
        f"{n}.json" for n in ("memory-accuracy-h100", "memory-accuracy-h200", "memory-targets-h100", "cards_run-h200")
    ]
    rows = [row for name in results for row in json.loads((PROJECT / "benchmarks/results" / name).read_text())["rows"]]
    rows = [row for row in rows if "parts_gib" in row and "measured_gib" in row]
    assert not [row for row in rows if abs(row["predicted_gib"] / row["measured_gib"] - 1) > 0.08]
    shapes = [("model", "resolution", "batch", "rank"), ("model",), ("resolution",), ("batch",), ("rank",)]
    configurations, *kinds = [len({tuple(row[name] for name in names) for row in rows}) for names in shapes]
    assert configurations >= 16
    assert kinds == [3, 3, 3, 2]


# Pictures between the steps


def drawing_of(decoding: int, rows: int = 2, side: int = 8) -> DrawingBetween:
    return DrawingBetween(DenoisingShape(1, (side, side), 97, torch.float16, 0), rows, {"VAE": decoding})


@pytest.mark.usefixtures("without_allowances")
def test_drawing_between_the_steps_is_a_phase_of_the_plan(miniature_files: ModelFiles) -> None:
    """Small, it changes no plan; large, it is the peak, and needs the budget for it."""
    task, budget = task_of(miniature_files, SHAPE), budget_of(1 << 40)
    without = plan_training(task, budget)
    small = plan_training(replace(task, drawing=drawing_of(1000)), budget)
    assert small.placement == without.placement
    assert small.forecast.peak_bytes == without.forecast.peak_bytes == small.forecast.phases[0].peak_bytes
    names = ["step", "denoise a validation picture", "decode a validation picture"]
    assert [phase.name for phase in small.forecast.phases] == names
    step, denoise, decode = (phase.parts for phase in small.forecast.phases)
    assert step["weights"] == denoise["weights"] == decode["weights"]
    trained = step["LoRA and optimizer"] / SHAPE.bytes_per_parameter
    assert denoise["LoRA"] == decode["LoRA"] == 10 * trained  # itself, its gradient, and its copy in 16 bits
    assert decode["VAE"] == 1000
    assert "working memory" in denoise

    large = replace(task, drawing=drawing_of(without.forecast.peak_bytes))
    plan = plan_training(large, budget)
    assert plan.forecast.largest.name == "decode a validation picture"
    assert plan.forecast.peak_bytes > without.forecast.peak_bytes
    with pytest.raises(UserError, match="training takes at least"):
        plan_training(large, budget_of(without.forecast.peak_bytes))


@pytest.mark.usefixtures("without_allowances")
def test_as_many_are_drawn_together_as_the_peak_has_room_for(miniature_files: ModelFiles) -> None:
    task, budget = replace(task_of(miniature_files, SHAPE), drawing=drawing_of(1000)), budget_of(1 << 40)
    assert drawn_together(task, Plan(plan_training(task, budget).placement, Forecast()), 9) == 8  # on a CPU
    rows = []
    for side in (8, 16, 32, 64):
        task = replace(task, drawing=drawing_of(1000, side=side))
        plan = plan_training(task, budget)
        rows.append(drawn_together(task, plan, 9))
        assert drawn_together(task, plan, 2) == min(4, rows[-1])
    assert rows == sorted(rows, reverse=True)
    assert (rows[0], rows[-1]) == (8, 1)
