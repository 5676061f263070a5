"""The device's memory runs out while a LoRA is trained: the run goes on with a cheaper plan and the same numbers."""

from __future__ import annotations

import random
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.records import TrainingBatch
from sd3_lora.plan.memory_plan import Plan
from sd3_lora.plan.step_execution import PlannedTraining
from sd3_lora.training.dataset import TrainingData
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE
from sd3_lora.transformer.placement import Placement

import pytest
import torch
from conftest import PROJECT, TRAINING_SCRIPT, Prepared, torchrun
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from training_runs import Run, Script, fail_in, same_lora, train, training_script

REASON = "CUDA out of memory. Tried to allocate 2.00 GiB"
WORDS: list[object] = ["--max_train_steps", 4, "--vram_budget_gib", 4, "--seed", 3, "--gradient_accumulation_steps", 2]
WORDS += ["--checkpointing_steps", 2, "--lora_dropout", 0.1, "--use_ema", "--train_batch_size", 2]
NOTE = "note: the GPU's memory ran out "  # or, of the last step, "after"


def run_out() -> None:
    raise torch.OutOfMemoryError(REASON)


class Operations(TorchDispatchMode):
    """Counts torch's operations: of the draws, forward, backward and of the update. In some the memory runs out.

    Attributes:
        failing: their numbers, from 1.
        count: of the operations so far.
        failed: the names of those that failed.
    """

    def __init__(self, failing: set[int]):
        super().__init__()
        self.failing, self.count, self.failed = failing, 0, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count in self.failing:
            self.failed.append(str(function))
            raise torch.OutOfMemoryError(REASON + ". GPU 0 has")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def let_fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Operations]:
    """`let_fail(70, 5000)`: the memory runs out in these of the operations of all loops of a run together."""
    take_steps, batch = training_script().take_steps, TrainingData.batch

    def on_host(*words: Any) -> TrainingBatch:
        with _disable_current_modes():  # files are read on the host
            return batch(*words)

    monkeypatch.setattr(TrainingData, "batch", on_host)

    def let_fail(*places: int) -> Operations:
        operations = Operations(set(places))

        def counted(*words: Any) -> float:
            with operations:
                steps: float = take_steps(*words)
            return steps

        monkeypatch.setattr(training_script(), "take_steps", counted)
        return operations

    return let_fail


def assert_same(run: Run, whole: Run) -> None:
    assert run.losses == whole.losses
    for name in (LORA_FILE, EMA_FILE):
        assert same_lora(run.folder / name, whole.folder / name)


@pytest.mark.usefixtures("without_allowances")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 8))])
def test_the_numbers_stay_wherever_the_memory_runs_out(
    script: Script, prepared: Prepared, tmp_path: Path, let_fail: Callable[..., Operations], seed: int
) -> None:
    operations = let_fail()
    whole = train(script, prepared, tmp_path / "whole", *WORDS)
    assert NOTE not in whole.out
    draws, count = random.Random(seed), operations.count
    for number in range(4):
        operations = let_fail(*(draws.randrange(1, count) for _ in range(1 + number % 2)))
        run = train(script, prepared, tmp_path / str(number), *WORDS)
        assert operations.failed
        assert run.out.count(NOTE) == len(operations.failed)
        assert_same(run, whole)


@pytest.mark.usefixtures("without_allowances")
def test_each_failure_makes_the_plan_cheaper_and_frees_what_was_held(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, models, peaks = training_script(), list[weakref.ref[Any]](), list[int]()
    load = module.load_training

    def loaded(job: Any, planned: Any) -> Any:
        assert not [model for model in models if model() is not None]  # the one before is freed first
        peaks.append(planned.plan.forecast.peak_bytes)
        training = load(job, planned)
        models.append(weakref.ref(training.transformer))
        return training

    monkeypatch.setattr(module, "load_training", loaded)
    whole = train(script, prepared, tmp_path / "whole", *WORDS)
    models.clear()
    peaks.clear()
    fail_in(monkeypatch, {1, 4}, run_out, after=True)
    run = train(script, prepared, tmp_path / "run", *WORDS)
    assert peaks == sorted(set(peaks), reverse=True)
    assert len(peaks) == 3
    assert f"{NOTE}at step 1 ({REASON}): beginning again, with a plan that takes less\nplan: " in run.out
    checkpoint = run.folder / "checkpoint-2"
    assert f"{NOTE}at step 3 ({REASON}): going on from {checkpoint}, with a plan that takes less\nplan: " in run.out
    assert_same(run, whole)


@pytest.mark.usefixtures("without_allowances")
def test_where_there_is_no_room_for_a_graph_the_plan_stays_without_one(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, captured = training_script(), list[tuple[Placement, bool]]()
    whole = train(script, prepared, tmp_path / "whole", *WORDS)
    make_plan, plan_run = module.make_plan, module.plan_run

    def least(*words: Any) -> Plan:
        plan: Plan = make_plan(*words)
        return replace(plan, forecast=replace(plan.forecast, has_room_for_graph=False))

    def as_on_a_gpu(*words: Any) -> PlannedTraining:
        planned: PlannedTraining = plan_run(*words)
        return replace(planned, execution=replace(planned.execution, captured=True))

    def loaded(job: Any, planned: PlannedTraining) -> Any:
        captured.append((planned.plan.placement, planned.execution.captured))
        return load(job, planned)

    load = module.load_training
    for name, function in (("make_plan", least), ("plan_run", as_on_a_gpu)):
        monkeypatch.setattr(module, name, function)
    fail_in(monkeypatch, {1, 4}, run_out)
    monkeypatch.setattr(module, "load_training", loaded)
    run = train(script, prepared, tmp_path / "run", *WORDS)
    assert f"{NOTE}at step 1 ({REASON}): beginning again, without a CUDA graph\n" in run.out
    assert "with a plan that takes less" in run.out  # the second time
    assert [is_captured for _, is_captured in captured] == [True, False, True]
    assert captured[0][0] == captured[1][0] != captured[2][0]
    assert_same(run, whole)


def test_where_nothing_fits_the_steps_are_kept_and_the_command_is_said(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--max_train_steps", 4, "--seed", 3]  # without a budget there is no plan on a CPU
    whole = train(script, prepared, tmp_path / "whole", *words)
    fail_in(monkeypatch, {4}, run_out)
    run = train(script, prepared, tmp_path / "run", *words, code=2)
    said = rf"the GPU's memory ran out at step 4 \({REASON}\): (.*) is kept; to go on, close other programs and type "
    said += "`(.*)`"
    kept, again = re.fullmatch(said, run.error).groups()  # type: ignore[union-attr]
    assert kept == str(run.folder / "checkpoint-3")
    assert again.endswith("--resume_from_checkpoint latest")
    assert not (run.folder / LORA_FILE).exists()
    go_on = train(script, prepared, run.folder, *words, "--resume_from_checkpoint", "latest")
    assert go_on.losses == whole.losses
    assert same_lora(go_on.folder / LORA_FILE, whole.folder / LORA_FILE)


@pytest.mark.usefixtures("without_allowances")
def test_a_whole_transformer_goes_back_to_its_checkpoint(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights change inside the backward pass, so a step that was cut off has no state to go on from."""
    words = ["--full", "--max_train_steps", 4, "--seed", 3, "--checkpointing_steps", 2, "--vram_budget_gib", 4]
    whole = train(script, prepared, tmp_path / "whole", *words)
    fail_in(monkeypatch, {4}, run_out, after=True)
    run = train(script, prepared, tmp_path / "run", *words)
    assert f"{NOTE}at step 4 ({REASON}): going on from {run.folder / 'checkpoint-2'}, with a plan" in run.out
    assert run.losses == whole.losses


RANK_WITHOUT_MEMORY = f"""
import os, sys
sys.path.insert(0, {str(PROJECT)!r})
import torch, {TRAINING_SCRIPT} as script
accumulate, calls = script.accumulate, []
def failing(*words):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "RANK_THAT_FAILS":
        raise ERROR
    return accumulate(*words)
script.accumulate = failing
sys.exit(script.main(sys.argv[1:]))
"""


@pytest.mark.faults
def test_of_several_processes_one_has_too_little(prepared: Prepared, tmp_path: Path) -> None:
    """They end together in a sentence, and go on from the last checkpoint; the device's memory or the host's."""
    words = [*prepared.flags, "--device", "cpu", "--max_train_steps", 4, "--checkpointing_steps", 1]
    whole = torchrun(f"{TRAINING_SCRIPT}.py", *words, "--output_dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    for rank, error in ((1, f"torch.OutOfMemoryError('{REASON}')"), (0, "MemoryError")):
        wrapper, out = tmp_path / "wrapper.py", tmp_path / f"run-{rank}"
        wrapper.write_text(RANK_WITHOUT_MEMORY.replace("RANK_THAT_FAILS", str(rank)).replace("ERROR", error))
        result = torchrun(wrapper, *words, "--output_dir", out)
        assert result.code != 0
        sentences = [line for line in result.err.splitlines() if "error: the " in line and " memory ran out (" in line]
        assert len(sentences) == 1, result.err
        assert f"at step 3: {out / 'checkpoint-2'} is kept; to go on, type `" in sentences[0]
        assert not (out / LORA_FILE).exists()
        resumed = ["--output_dir", out, "--resume_from_checkpoint", "latest"]
        again = torchrun(f"{TRAINING_SCRIPT}.py", *words, *resumed)
        assert again.code == 0, again.err
        assert same_lora(out / LORA_FILE, tmp_path / "whole" / LORA_FILE)
