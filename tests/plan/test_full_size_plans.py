"""The full-size model's plans: pictures that are drawn between the steps take no byte more than a step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import train_dreambooth_sd3_lora_miniature as script
from sd3_lora.common import memory as host_memory
from sd3_lora.common.command_line import UserError
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.gpu.budget import BudgetTooSmall, open_budget
from sd3_lora.plan import memory_plan
from sd3_lora.plan.memory_plan import Plan, drawn_together
from sd3_lora.plan.step_memory import simulate_denoising
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.training.config import TrainingFlags

import psutil
import pytest
import torch
from conftest import PROJECT
from small_transformer import CPU

sys.path.insert(0, str(PROJECT / "benchmarks"))

import memory

FULL_SIZE = {
    "nothing recomputed": [],
    "all recomputed": ["--recompute_blocks", 24],
    "inputs offloaded": ["--recompute_blocks", 24, "--offload_inputs", "on"],
    "in 4 bits": ["--base_precision", "nf4"],
    "in 4 bits, all recomputed": ["--base_precision", "nf4", "--recompute_blocks", 24],
    "some streamed": ["--vram_budget_gib", 3],
    "all streamed": ["--vram_budget_gib", 1.6],
    "the least": ["--stream_blocks", 24, "--recompute_blocks", 24, "--offload_inputs", "on", "--stream_buffers", 2],
    "the last block alone": ["--lora_blocks", 23],
    "a large LoRA": ["--rank", 128, "--lora_layers", "attention+mlp"],
}


@pytest.mark.parametrize("resolution", [512, 1024])
@pytest.mark.parametrize("asked", FULL_SIZE)
def test_no_phase_of_drawing_is_above_the_step(
    tmp_path_factory: pytest.TempPathFactory, asked: str, resolution: int
) -> None:
    """With as many rows at a time and as large tiles as are chosen; in each placement of the full-size model."""
    model = memory.hollow_model(tmp_path_factory.getbasetemp(), "sd3-medium")
    words = ["--pretrained_model_name_or_path", model, "--resolution", resolution, "--mixed_precision", "fp16"]
    words += ["--plan", "--validation_prompt", "a dog", *FULL_SIZE[asked]]
    flags = TrainingFlags(*script.COMMAND_LINE.parse([str(word) for word in words]))
    files, budget = ModelFiles(flags.model), open_budget(flags.budget, CPU)
    assert budget is not None
    task = script.training_task(flags, files, Buckets.square(resolution), torch.float16, CPU, 1)
    plan = script.make_plan(task, budget)
    step, *between = plan.forecast.phases
    assert all(phase.peak_bytes <= step.peak_bytes for phase in between)

    rows = drawn_together(task, plan, 4)
    assert rows in (1, 2, 4, 6, 8)
    shape, place = replace(task.drawing.shape, batch_size=rows), plan.placement
    working = simulate_denoising(files.read_config("transformer"), shape, place.precision, place.attention_kernel)
    least = simulate_denoising(files.read_config("transformer"), task.drawing.shape, place.precision)
    assert between[0].peak_bytes + 1.25 * (working - least) <= step.peak_bytes
    tile = script.validation_tile(files, script.validation_work(flags, files), plan, budget)
    decoding = between[1].peak_bytes - sum(task.drawing.decoding.values()) + tile.weight_bytes + tile.working_bytes
    assert decoding <= step.peak_bytes


def plan_whole(folder: Path, *more: object) -> Plan:
    """Of `--full` at 1024 px in bfloat16."""
    words = ["--pretrained_model_name_or_path", folder, "--resolution", 1024, "--plan", "--full", *more]
    flags = TrainingFlags(*script.COMMAND_LINE.parse([str(word) for word in words])).settled()
    files, budget = ModelFiles(flags.model), open_budget(flags.budget, CPU)
    assert budget is not None
    task = script.training_task(flags, files, Buckets.square(1024), torch.bfloat16, CPU, 1)
    assert task.can_stream == (flags.run.gradient_accumulation_steps == 1)
    plan: Plan = script.make_plan(task, budget)
    return plan


@pytest.mark.parametrize(
    ("model", "gib", "host_gib"), [("sd3-medium", 4.0, 8.2), ("sd3.5-medium", 4.0, 9.5), ("sd3.5-large", 10.0, 33)]
)
def test_the_whole_transformer_is_streamed_where_it_does_not_fit(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, model: str, gib: float, host_gib: float
) -> None:
    """Within the budgets that were asked for, and the host's need as docs/full.md has it."""
    monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: 64 * GIB)
    folder = memory.hollow_model(tmp_path_factory.getbasetemp(), model)
    least = plan_whole(folder, "--vram_budget_gib", gib, "--stream_blocks", {"sd3.5-large": 38}.get(model, 24))
    found = plan_whole(folder, "--vram_budget_gib", gib)
    for plan in (least, found):
        assert plan.placement.streamed
        assert plan.placement.stream_from == "host"
        assert not plan.placement.ahead_blocks
        assert plan.forecast.peak_bytes <= gib * GIB
    assert least.forecast.host_bytes <= host_gib * GIB
    monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: 4 * GIB)
    with pytest.raises(UserError, match=r"--full with streamed blocks keeps .* of host memory, of which 2.0 GiB are"):
        plan_whole(folder, "--vram_budget_gib", gib)


_GROUPS = {  # version of the control groups → which group is one's own; the files of its limit, use and statistics
    "v1": ("5:memory:/c\n", "memory/c", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_active_file"),
    "v2": ("0::/c\n", "c", ("memory.max", "memory.current"), "active_file"),
}


@pytest.mark.parametrize(("version", "model", "source"), [("v1", "sd3-medium", "host"), ("v2", "sd3.5-large", "files")])
def test_a_plan_stays_within_a_containers_memory(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    model: str,
    source: str,
) -> None:
    """Of 12 GiB, 3 are in use, of which 2 are pages of files; the machine has 200 free."""
    group, place, names, pages = _GROUPS[version]
    (tmp_path / "own").write_text(group)
    (tmp_path / place).mkdir(parents=True)
    for name, gib in zip(names, (12, 3), strict=True):
        (tmp_path / place / name).write_text(f"{gib * GIB}\n")
    (tmp_path / place / "memory.stat").write_text(f"anon 5\n{pages} {2 * GIB}\n")
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(host_memory, "_ALL_GROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200 * GIB))
    assert host_memory.available_host_bytes() == 11 * GIB

    folder = memory.hollow_model(tmp_path_factory.getbasetemp(), model)
    words = ["--pretrained_model_name_or_path", folder, "--resolution", 1024, "--plan", "--vram_budget_gib", 4]
    flags = TrainingFlags(*script.COMMAND_LINE.parse([*map(str, words), "--mixed_precision", "fp16"]))
    files, budget = ModelFiles(flags.model), open_budget(flags.budget, CPU)
    assert budget is not None
    plan = script.make_plan(script.training_task(flags, files, Buckets.square(1024), torch.float16, CPU, 1), budget)
    assert plan.placement.streamed
    assert plan.placement.stream_from == source
    assert plan.forecast.host_bytes + memory_plan.HOST_ROOM_BYTES <= 11 * GIB


@pytest.mark.parametrize(("model", "least_gib"), [("sd3-medium", 9.1), ("sd3.5-medium", 10.2), ("sd3.5-large", 32.4)])
def test_the_whole_transformer_has_weights_state_and_one_gradient(
    tmp_path_factory: pytest.TempPathFactory, model: str, least_gib: float
) -> None:
    """In bfloat16; the figures are those of docs/full.md."""
    folder = memory.hollow_model(tmp_path_factory.getbasetemp(), model)

    def plan(*more: object) -> Plan:
        return plan_whole(folder, "--stream_blocks", 0, *more)

    found = plan("--vram_budget_gib", least_gib)
    place, (step, save) = found.placement, found.forecast.phases
    assert place.whole
    assert not place.streamed
    assert place.precision is None
    assert save.name == "save"
    assert save.peak_bytes < step.peak_bytes
    # 8 bits for each of two moments, and a scale of 32 bits for 256 of them.
    assert step.parts["optimizer"] == pytest.approx(step.parts["weights"] * (1 + 4 / 256), rel=0.02)
    assert step.parts["working memory"] < 0.3 * GIB  # not a gradient of every weight
    kept = plan_whole(folder, "--gradient_accumulation_steps", 4, "--vram_budget_gib", 80).forecast.largest.parts[
        "optimizer"
    ]
    assert kept - step.parts["optimizer"] == pytest.approx(step.parts["weights"], rel=0.02)
    with pytest.raises(BudgetTooSmall, match="too little") as refused:
        plan("--vram_budget_gib", 4)
    assert "nf4" not in str(refused.value)
