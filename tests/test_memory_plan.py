"""The memory plan: what it predicts is what runs, it grows with the budget, and every plan trains to the same bits."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from sd3_lora import memory_plan
from sd3_lora.budget import (
    ASSUMED_CONTEXT_BYTES,
    BudgetConfig,
    DeviceBudget,
    _context_bytes,
    open_budget,
    sentence,
)
from sd3_lora.checkpointing import checkpoint_blocks
from sd3_lora.command_line import UserError
from sd3_lora.lora import LORA_FILE
from sd3_lora.mapped_pieces import MappedPieces
from sd3_lora.memory import GIB, drop_workspaces
from sd3_lora.memory_plan import (
    BasePlan,
    TrainingPlan,
    each_plan,
    plan_denoising,
    plan_training,
    visiting_blocks,
)
from sd3_lora.model_files import MINIATURE, ModelConfig, ModelFiles
from sd3_lora.pinned_memory import pinned_bytes
from sd3_lora.step_memory import DenoisingShape, StepMemory, StepShape, simulate_step
from sd3_lora.step_time import PieceCost, StepCost, StepSize, block_sizes, computed_flops, copied_flops, model_costs
from sd3_lora.streaming import PinnedPieces, StreamedBlocks, stream_transformer

import pytest
import torch
from conftest import PROJECT, TRAINING_SCRIPT, save_pictures
from PIL import Image
from small_transformer import CPU, GPU, needs_gpu
from training_runs import Flags, Script, same_lora, train

SHAPE = StepShape(2, 8, 97, None, None, 4, 0.0, torch.float16, False)


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return ModelFiles(ModelConfig(str(MINIATURE)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fixed allowances, which are larger than the miniature; on a host that holds everything.

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
    return DeviceBudget(size, ASSUMED_CONTEXT_BYTES, CPU)


# The plan


def list_plans(*words: Any, **more: Any) -> list[TrainingPlan]:
    return list(each_plan(*words, **more))


def time_of(plan: TrainingPlan, costs: list[PieceCost], size: StepSize) -> tuple[float, float]:
    """What its place in the order is by."""
    copied = copied_flops(block_sizes(costs), plan.visiting, plan.checkpointed, plan.from_files)
    return StepCost(computed_flops(costs, size, plan.checkpointed), copied).time


@pytest.mark.parametrize("asked", ["16bit", "nf4", "auto"])
@pytest.mark.usefixtures("small")
def test_more_budget_is_never_a_slower_plan(files: ModelFiles, asked: memory_plan.AskedPrecision) -> None:
    plans = list_plans(files, SHAPE, budget_of(1 << 40), asked, False, True)
    peaks = sorted(plan.peak_bytes for plan in plans)
    places = []
    for size in range(peaks[0], peaks[-1] + 1, (peaks[-1] - peaks[0]) // 40):
        chosen = plan_training(files, SHAPE, budget_of(size), asked)
        assert chosen.peak_bytes <= size
        places.append(plans.index(chosen))
    assert places == sorted(places, reverse=True)
    assert len(set(places)) > 5


@pytest.mark.usefixtures("small")
def test_exact_measures_come_in_the_order_of_their_speed(files: ModelFiles) -> None:
    """On the device, with more and more blocks anew; then fewer blocks there and more anew; then the last resorts."""
    plans = list_plans(files, SHAPE, budget_of(1 << 40), "16bit", False, True)
    assert all(plan.base_precision is None for plan in plans)
    resident = [plan for plan in plans if not plan.streamed]
    assert plans[: len(resident)] == resident
    assert [plan.checkpointed for plan in resident] == [0, 1, 2, 3, 4, 5, 5]
    assert [plan.offload_inputs for plan in resident] == [False] * 6 + [True]
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(set(peaks), reverse=True)

    mixed, last = plans[len(resident) : -5], plans[-5:]
    assert [plan.buffers for plan in mixed] == [6] * len(mixed)
    config = files.read_config("transformer")
    costs, size = model_costs(config, torch.float16, None), StepSize.of(config, SHAPE)
    times = [time_of(plan, costs, size) for plan in mixed]
    assert times == sorted(times)
    ways = {(plan.visiting, plan.checkpointed) for plan in mixed}
    assert len({way[0] for way in ways}) > 4
    assert len({way[1] for way in ways}) > 2
    assert len(mixed) == len(ways) > 10

    assert {(plan.visiting, plan.checkpointed) for plan in last} == {(tuple(range(6)), 5)}
    assert [plan.buffers for plan in last] == [6, 4, 3, 2, 2]
    assert [plan.offload_inputs for plan in last] == [True] * 5
    assert [plan.has_room_for_graph for plan in plans] == [True] * (len(plans) - 1) + [False]
    everywhere = list_plans(files, SHAPE, budget_of(1 << 40), "16bit", True, True)
    assert {plan.checkpointed for plan in everywhere} == {6}
    assert not any(plan.streamed for plan in list_plans(files, SHAPE, budget_of(1), "16bit", False, can_stream=False))


@pytest.mark.usefixtures("small")
def test_no_plan_is_left_out_that_a_budget_has_use_for(files: ModelFiles) -> None:
    """Of all pairs of blocks that stay and blocks computed anew, for any budget the fastest that fits is listed."""
    plans = [p for p in list_plans(files, SHAPE, budget_of(1 << 40), "16bit", False, True) if p.streamed]
    config = files.read_config("transformer")
    costs, size = model_costs(config, torch.float16, None), StepSize.of(config, SHAPE)
    step = simulate_step(config, SHAPE, None)
    places = memory_plan._Places(files, torch.float16, None, (8, 8))
    pairs = []
    for staying, k in itertools.product(range(6), range(6)):
        plan = memory_plan._predict(step, SHAPE, budget_of(1 << 40), None, places.streamed(staying, 6), k)
        pairs.append((time_of(plan, costs, size), plan.peak_bytes))
    for budget in sorted(peak for _, peak in pairs if peak < plans[0].peak_bytes):
        fastest = min(time for time, peak in pairs if peak <= budget)
        listed = next(plan for plan in plans if plan.peak_bytes <= budget)
        assert time_of(listed, costs, size) == fastest


@pytest.mark.parametrize(("was_there", "gib"), [(False, 0.5), (True, 0.75)])
def test_a_context_that_was_there_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, was_there: bool, gib: float
) -> None:
    """As in a process of several, which has chosen its GPU before; what it adds now would be far too little."""
    used = iter([int(3 * GIB), int((3.15 if was_there else 3.5) * GIB)])
    monkeypatch.setattr("sd3_lora.budget._CONTEXTS", {})
    monkeypatch.setattr("sd3_lora.budget.driver_bytes", lambda index: next(used))
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: was_there, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    assert _context_bytes(torch.device("cpu", 0)) == int(gib * GIB)


@needs_gpu
def test_opening_a_budget_leaves_nothing_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even cuBLAS's workspace of a stream on which a recorded step does not compute."""
    monkeypatch.setattr("sd3_lora.budget._CONTEXTS", {})
    drop_workspaces(GPU)
    before = torch.cuda.memory_allocated()
    assert open_budget(BudgetConfig(), GPU)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(("offload", "mib"), [(False, 8), (True, 8 + 48)])
def test_a_graph_takes_memory_of_its_own(files: ModelFiles, offload: bool, mib: int) -> None:
    places = memory_plan._Places(files, torch.float16, None, (8, 8))
    step = simulate_step(files.read_config("transformer"), SHAPE, None)
    with_it, without = (
        memory_plan._predict(step, SHAPE, budget_of(1 << 40), None, places.streamed(0, 2), 5, offload, room).peak_bytes
        for room in (True, False)
    )
    assert with_it - without == mib * 1024**2


@pytest.mark.usefixtures("small")
def test_a_fast_gpu_keeps_blocks_and_a_slow_one_activations(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a copy costs, counted in FLOPs, is the GPU's own; of the same memory they make different use."""
    staying, anew = [], []
    exact = list_plans(files, SHAPE, budget_of(1 << 40), "16bit", False, True)
    budgets = [plan.peak_bytes for plan in exact if plan.streamed and not plan.offload_inputs]
    for rate in (1, 10, 20, 40, 1000):
        measure = MagicMock(return_value=rate)
        monkeypatch.setattr(memory_plan, "measure_flops_a_byte", measure)
        plans = [plan_training(files, SHAPE, budget_of(size)) for size in budgets]
        staying.append(sum(plan.blocks - len(plan.visiting) for plan in plans))
        anew.append(sum(plan.checkpointed for plan in plans))
        measure.assert_called_with(CPU, torch.float16)
        measure.reset_mock()
        plan_training(files, SHAPE, budget_of(max(plan.peak_bytes for plan in exact)))
        measure.assert_not_called()  # all is on the device
    assert staying == sorted(staying)
    assert anew == sorted(anew)
    assert staying[0] < staying[-1]
    assert anew[0] < anew[-1]


@pytest.mark.parametrize("count", [1, 6, 24, 38])
def test_the_blocks_that_stay_are_spread(count: int) -> None:
    assert visiting_blocks(count, 0) == tuple(range(count))
    for staying in range(count):
        visiting = visiting_blocks(count, staying)
        assert len(visiting) == count - staying
        runs = "".join("v" if i in visiting else " " for i in range(count)).split()
        assert max(map(len, runs)) - min(map(len, runs[:-1] or runs)) <= 1


@pytest.mark.usefixtures("small")
def test_auto_takes_4_bits_rather_than_stream(files: ModelFiles) -> None:
    plans = list_plans(files, SHAPE, budget_of(1 << 40), "auto", False, True)
    kinds = list(dict.fromkeys((plan.streamed, plan.base_precision) for plan in plans))
    assert kinds == [(False, None), (False, "nf4"), (True, None), (True, "nf4")]


def test_where_nothing_fits_the_sentence_names_what_would(files: ModelFiles) -> None:
    with pytest.raises(UserError) as error:
        plan_training(files, SHAPE, budget_of(GIB // 2))
    asked = re.search(r"--vram_budget_gib ([\d.]+)", str(error.value))
    assert asked, error.value
    assert plan_training(files, SHAPE, budget_of(int(float(asked[1]) * GIB)))
    with pytest.raises(
        UserError, match=r"denoise a picture, which takes at least [\d.]+ GiB here: type --vram_budget_gib"
    ):
        plan_denoising(files, DenoisingShape(2, (16, 16), 154, torch.float16, 0), budget_of(GIB // 2))


@pytest.mark.usefixtures("small")
def test_4_bits_are_offered_where_they_would_do(files: ModelFiles) -> None:
    exact = min(plan.peak_bytes for plan in list_plans(files, SHAPE, budget_of(1), "16bit", False, True))
    packed = min(plan.peak_bytes for plan in list_plans(files, SHAPE, budget_of(1), "nf4", False, True))
    assert packed < exact
    with pytest.raises(UserError, match="add --base_precision nf4"):
        plan_training(files, SHAPE, budget_of(packed))


@pytest.mark.usefixtures("small")
def test_drawing_streams_where_the_base_does_not_fit(files: ModelFiles) -> None:
    shape = DenoisingShape(2, (16, 16), 154, torch.float32, 0)
    resident = plan_denoising(files, shape, budget_of(1 << 40))
    assert not resident.streamed
    streamed = plan_denoising(files, shape, budget_of(resident.peak_bytes - 1))
    assert streamed.streamed
    assert streamed.peak_bytes < resident.peak_bytes
    assert 0 < len(streamed.visiting) < 6
    costs = model_costs(files.read_config("transformer"), torch.float32, None)
    plan, found = streamed, []
    while plan.buffers > 2:
        found.append((len(plan.visiting), plan.buffers))
        pieces = [piece.size for piece in costs if piece.block in plan.visiting]
        saved = resident.parts["weights"] - plan.parts["weights"]
        assert saved == sum(pieces) - plan.buffers * max(pieces)
        plan = plan_denoising(files, shape, budget_of(plan.peak_bytes - 1))
    assert found == [*((count, 6) for count in range(found[0][0], 7)), (6, 4), (6, 3)]
    assert plan_denoising(files, shape, None).parts == {}
    assert plan_denoising(files, shape, budget_of(1 << 40), "nf4").peak_bytes < resident.peak_bytes


@pytest.mark.usefixtures("small")
def test_a_host_that_is_too_small_streams_from_the_files(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = model_costs(files.read_config("transformer"), torch.float16, None)
    pieces = [piece.size for piece in costs]
    enough = pinned_bytes(pieces) + memory_plan.HOST_ROOM_BYTES

    def plans(available: int, asked: memory_plan.AskedPrecision = "auto") -> list[BasePlan]:
        monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: available)
        listed = list_plans(files, SHAPE, budget_of(1 << 40), asked, False, True)
        return [*listed, plan_denoising(files, DenoisingShape(2, (16, 16), 154, torch.float16, 0), budget_of(1 << 40))]

    def own_bytes(plan: BasePlan) -> int:
        return pinned_bytes([piece.size for piece in costs if piece.block in plan.visiting])

    large, small, between = plans(enough), plans(0), plans(enough - 1, "16bit")
    assert not any(plan.from_files for plan in large)
    for plan in (*small, *between):
        exact = plan.streamed and plan.base_precision is None
        assert plan.from_files == (exact and (plan in small or own_bytes(plan) == pinned_bytes(pieces)))
        assert plan.from_files or not exact or plan.host_bytes == own_bytes(plan)
    assert {plan.from_files for plan in between if plan.streamed and plan.base_precision is None} == {True, False}
    assert large[-2].parts == small[-2].parts  # of the device's memory the host changes nothing
    (*_, plan) = (plan for plan in large[:-1] if plan.streamed and plan.base_precision is None)
    assert plan.host_bytes == pinned_bytes(pieces)
    assert plan.sentence().startswith(
        "base unchanged, streamed from host memory piece by piece (0.0 GiB pinned, 2 pieces on "
    )
    some = next(plan for plan in between if plan.streamed)
    assert some.sentence().startswith("base unchanged, 2 of its 6 blocks streamed from host memory piece by piece (")
    (*_, plan) = (plan for plan in small[:-1] if plan.from_files)
    assert plan.host_bytes == pinned_bytes(3 * [max(pieces)])
    assert plan.sentence().startswith(
        "base unchanged, streamed from the weight files piece by piece (0.0 GiB pinned, 2 "
    )
    assert {plan.host_bytes for plan in large if not plan.streamed} == {0}


# The budget


def test_a_budget_on_a_cpu_is_planned_as_on_a_gpu() -> None:
    assert open_budget(BudgetConfig(), CPU) is None
    budget = open_budget(BudgetConfig(8.0), CPU)
    assert budget is not None
    assert budget.tensor_bytes == 8 * GIB - ASSUMED_CONTEXT_BYTES
    assert budget.used_bytes([]) == 0
    with pytest.raises(UserError, match=r"--vram_budget_gib 0.5: CUDA itself takes 0.75 GiB: ask for more"):
        open_budget(BudgetConfig(0.5), CPU)
    with pytest.raises(ValueError, match="must be positive"):
        BudgetConfig(-1.0)
    assert sentence({"weights": GIB, "nothing": 0, "rest": GIB // 2}) == "weights 1.00 + rest 0.50 = 1.50 GiB"


# The script


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """Of the miniature: three pictures at 64 px, T5 length 20."""
    import compute_embeddings
    import precompute_latents

    folder = tmp_path_factory.mktemp("miniature")
    pictures = folder / "pictures"
    save_pictures(pictures, [(64, 64)] * 3)
    model = ["--pretrained_model_name_or_path", str(MINIATURE), "--instance_data_dir", str(pictures), "--device", "cpu"]
    text = ["--instance_prompt", "a photo of sks fish", "--max_sequence_length", "20"]
    assert compute_embeddings.main([*model, *text, "--output_path", str(folder / "e.parquet")]) == 0
    assert precompute_latents.main([*model, "--resolution", "64", "--output_path", str(folder / "latents")]) == 0
    words = [*model[:4], "--instance_prompt", "a photo of sks fish", "--data_df_path", folder / "e.parquet"]
    words += ["--latents_path", folder / "latents", "--resolution", 64, "--report_to", "none", "--seed", 0]
    return Flags([*words, "--learning_rate", 0.01, "--lora_dropout", 0.2])


def script_plans(files: ModelFiles, asked: memory_plan.AskedPrecision = "16bit") -> list[TrainingPlan]:
    shape = StepShape(1, 8, 97, None, None, 4, 0.2, torch.float32, False)
    return list_plans(files, shape, budget_of(1 << 40), asked, False, True)


def gib(size: int) -> str:
    return repr((size + 1) / GIB)


@pytest.mark.usefixtures("small")
def test_every_plan_trains_to_the_same_bits(
    script: Script, files: ModelFiles, stage_one: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_dreambooth_sd3_lora_miniature as training

    done: list[tuple] = []

    def stream(*words: object) -> StreamedBlocks:
        done.append(("streamed", words[-1]))
        return stream_transformer(*words)

    def checkpoint(transformer: torch.nn.Module, *words: object) -> None:
        done.append(words)
        checkpoint_blocks(transformer, *words)

    monkeypatch.setattr(training, "stream_transformer", stream)
    monkeypatch.setattr(training, "checkpoint_blocks", checkpoint)
    plain = train(script, stage_one, tmp_path / "plain")
    assert "plan:" not in plain.out
    plans = script_plans(files)
    kept = [index for index, plan in enumerate(plans) if plan.buffers == 6 and not plan.offload_inputs]
    some = {len(plans[index].visiting): index for index in kept}
    chosen = [0, 3, 6, *some.values(), *range(len(plans) - 5, len(plans))]
    assert len(some) > 4
    for index in chosen:
        folder = tmp_path / str(index)
        run = train(script, stage_one, folder, "--vram_budget_gib", gib(plans[index].peak_bytes))
        assert f"plan: {plans[index].sentence()}" in run.out
        assert run.losses == plain.losses
        if plans[index].streamed:
            assert done[-2] == ("streamed", plans[index].visiting)
        assert done[-1] == (plans[index].checkpointed, plans[index].offload_inputs)
        assert same_lora(run.folder / LORA_FILE, plain.folder / LORA_FILE)
        noted = json.loads((folder / "run.json").read_text())["plan"]
        assert noted["parts"] == plans[index].parts
        assert (noted["checkpointed"], noted["buffers"]) == (plans[index].checkpointed, plans[index].buffers)
        assert tuple(noted["visiting"]) == plans[index].visiting
    assert sum(words[0] == "streamed" for words in done) == len(chosen) - 3


@pytest.mark.usefixtures("small")
def test_a_streamed_run_goes_on_resident_and_4_bits_go_on_in_4_bits(
    script: Script, files: ModelFiles, stage_one: Flags, tmp_path: Path
) -> None:
    streamed, packed = script_plans(files)[-1], script_plans(files, "nf4")[-1]
    whole = train(script, stage_one, tmp_path / "whole", "--max_train_steps", 4)
    halves = [stage_one, tmp_path / "halves"]
    train(script, *halves, "--max_train_steps", 2, "--vram_budget_gib", gib(streamed.peak_bytes))
    run = train(script, *halves, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert same_lora(run.folder / LORA_FILE, whole.folder / LORA_FILE)
    refused = train(
        script, *halves, "--max_train_steps", 5, "--resume_from_checkpoint", "latest", "--base_precision", "nf4", code=2
    )
    assert "--base_precision 16bit, not nf4" in refused.err

    words = ["--base_precision", "nf4", "--max_train_steps", 2]
    plain = train(script, stage_one, tmp_path / "nf4", *words)
    assert plain.losses != whole.losses[:2]
    run = train(script, stage_one, tmp_path / "streamed nf4", *words, "--vram_budget_gib", gib(packed.peak_bytes))
    assert run.losses == plain.losses


@pytest.mark.usefixtures("small")
def test_a_run_streams_from_the_files_and_goes_on_from_host_memory(
    script: Script, files: ModelFiles, stage_one: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_dreambooth_sd3_lora_miniature as training

    sources: list[tuple] = []
    monkeypatch.setattr(
        training, "stream_transformer", lambda *words: sources.append(words[2:]) or stream_transformer(*words)
    )
    whole = train(script, stage_one, tmp_path / "whole", "--max_train_steps", 4)
    budget = ["--vram_budget_gib", gib(script_plans(files)[-1].peak_bytes)]
    with monkeypatch.context() as patch:
        patch.setattr(memory_plan, "available_host_bytes", lambda: 0)
        half = train(script, stage_one, tmp_path / "halves", "--max_train_steps", 2, *budget)
    assert "plan: base unchanged, streamed from the weight files piece by piece (" in half.out
    noted = json.loads((half.folder / "run.json").read_text())["plan"]
    assert noted["from_files"]
    costs = model_costs(files.read_config("transformer"), torch.float32, None)
    assert noted["host_bytes"] == pinned_bytes(3 * [max(piece.size for piece in costs)])
    assert half.losses == whole.losses[:2]
    run = train(
        script, stage_one, tmp_path / "halves", "--max_train_steps", 4, "--resume_from_checkpoint", "latest", *budget
    )
    assert "plan: base unchanged, streamed from host memory piece by piece (" in run.out
    assert same_lora(run.folder / LORA_FILE, whole.folder / LORA_FILE)
    assert [type(source) for source, *_ in sources] == [MappedPieces, PinnedPieces]


def test_plan_prints_and_writes_nothing(
    script: Script, stage_one: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_dreambooth_sd3_lora_miniature as training

    for name in ("load_transformer", "open_data"):
        monkeypatch.setattr(training, name, None)
    monkeypatch.chdir(tmp_path)
    words = ["--pretrained_model_name_or_path", MINIATURE, "--output_dir", "lora", "--device", "cpu"]
    result = script(TRAINING_SCRIPT, *words, "--plan", "--vram_budget_gib", "2")
    assert result.code == 0, result.err
    assert "plan: base unchanged, on the device; 0 of 6 blocks computed anew in backward\n" in result.out
    assert re.search(r"predicted peak: CUDA 0.75 \+ weights .* = 0\.\d\d GiB\n", result.out)
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_a_plan_is_one_for_a_gpu(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's precisions, unless a CPU was asked for; and what is done here is done in a CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sd3_lora.devices.has_nvidia_gpu", lambda: False)
    words = ["--pretrained_model_name_or_path", MINIATURE, "--plan", "--vram_budget_gib", 4]
    draw = [*words, "--prompt", "a fish"]

    def said(name: str, *words: object) -> str:
        result = script(name, *words)
        assert result.code == 0, result.err
        return result.out

    assert "transformer in fp16: half the memory" in said(TRAINING_SCRIPT, *words)
    assert "transformer in bf16: as asked" in said(TRAINING_SCRIPT, *words, "--mixed_precision", "bf16")
    assert "transformer in fp32: the exact" in said(TRAINING_SCRIPT, *words, "--device", "cpu")
    assert "transformer in fp16, base" in said("inference", *draw)
    assert "transformer in fp32, base" in said("inference", *draw, "--device", "cpu")
    assert "T5 in int8: CUDA 0.75" in said("compute_embeddings", *words)
    assert "T5 in fp32: CUDA 0.75" in said("compute_embeddings", *words, "--device", "cpu")


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


@pytest.mark.usefixtures("small")
def test_a_streamed_picture_is_the_resident_one_and_nf4_is_another(
    script: Script, files: ModelFiles, stage_one: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import inference

    monkeypatch.setattr(memory_plan, "WORKSPACE_BYTES", 0)
    streams: list[tuple] = []
    monkeypatch.setattr(
        inference, "stream_transformer", lambda *words: streams.append(words) or stream_transformer(*words)
    )
    lora = train(script, stage_one, tmp_path / "lora", "--max_train_steps", 1)
    words = ["--pretrained_model_name_or_path", MINIATURE, "--lora", lora.folder, "--prompt", "a photo of sks fish"]
    words += ["--data_df_path", stage_one.flags[stage_one.flags.index("--data_df_path") + 1], "--device", "cpu"]
    words += ["--num_steps", 2, "--guidance", 3]

    def draw(name: str, *more: object) -> bytes:
        result = script("inference", *words, "--outdir", tmp_path / name, *more)
        assert result.code == 0, result.err
        (path,) = (tmp_path / name).glob("*/img_00.png")
        with Image.open(path) as picture:
            return picture.tobytes()

    resident = draw("resident")
    shape = DenoisingShape(2, (8, 8), 97, torch.float32, lora.folder.joinpath(LORA_FILE).stat().st_size)
    whole = plan_denoising(files, shape, budget_of(1 << 40)).peak_bytes
    assert streams == []
    assert draw("streamed", "--vram_budget_gib", gib(whole - 2**20)) == resident
    assert [(type(source), buffers) for _, _, source, buffers, _ in streams] == [(PinnedPieces, 6)]
    assert 0 < len(streams[0][-1]) < 6  # some blocks stay
    with monkeypatch.context() as patch:
        patch.setattr(memory_plan, "available_host_bytes", lambda: 0)
        assert draw("from files", "--vram_budget_gib", gib(whole - 2**20)) == resident
    assert [type(source) for _, _, source, *_ in streams] == [PinnedPieces, MappedPieces]
    assert draw("nf4", "--base_precision", "nf4") != resident
