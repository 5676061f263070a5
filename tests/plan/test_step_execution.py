"""What --compile comes to, and that a recorded or compiled step is the step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.plan.memory_plan import plain_plan
from sd3_lora.plan.step_execution import (
    COMPILE_FROM_MICRO_STEPS,
    StepExecution,
    choose_execution,
    compile_blocks,
)

import pytest
import torch
from conftest import Prepared
from small_transformer import CPU, GPU, inputs, make_transformer
from training_runs import Script, train, training_script

RESIDENT = plain_plan(24, "16bit", False)
STREAMED, NF4 = replace(RESIDENT, streamed_blocks=(0, 1), buffers=2), replace(RESIDENT, base_precision="nf4")
FROM_FILES, TIGHT = replace(STREAMED, from_files=True), replace(STREAMED, has_room_for_graph=False)
MANY, FEW = COMPILE_FROM_MICRO_STEPS, COMPILE_FROM_MICRO_STEPS - 1


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3_lora.plan.step_execution._has_triton", lambda: True)


def chosen(asked, plan=RESIDENT, device=GPU, dropout=0.0, micro_steps=FEW, before=None) -> tuple[bool, bool]:
    execution = choose_execution(asked, plan, device, dropout, micro_steps, before)
    return execution.compiled, execution.captured


def test_auto_records_what_a_graph_can_hold() -> None:
    assert chosen("auto") == (False, True)
    assert chosen("auto", plan=NF4) == (False, True)
    assert chosen("auto", plan=STREAMED) == (False, True)
    assert chosen("auto", plan=replace(RESIDENT, offload_inputs=True)) == (False, True)
    assert chosen("auto", plan=FROM_FILES) == (False, False)
    assert chosen("auto", plan=TIGHT) == (False, True)  # is tried
    assert chosen("auto", dropout=0.1) == (False, False)
    assert chosen("auto", device=CPU) == (False, False)


def test_auto_compiles_where_the_steps_repay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("auto", micro_steps=MANY) == (True, True)
    assert chosen("auto", micro_steps=MANY, dropout=0.1) == (True, False)
    for plan in (STREAMED, NF4):
        assert not chosen("auto", plan=plan, micro_steps=MANY)[0]
    assert chosen("auto", micro_steps=MANY, device=CPU) == (False, False)
    monkeypatch.setattr("sd3_lora.plan.step_execution._has_triton", lambda: False)
    assert chosen("auto", micro_steps=MANY) == (False, True)


def test_auto_keeps_a_resumed_runs_numbers() -> None:
    compiled = choose_execution("auto", RESIDENT, GPU, 0, MANY).kernels
    plain = choose_execution("auto", RESIDENT, GPU, 0, FEW).kernels
    assert plain == choose_execution("off", RESIDENT, GPU, 0, MANY).kernels  # a graph's kernels are the plain ones
    assert compiled == choose_execution("blocks", RESIDENT, GPU, 0, FEW).kernels
    assert chosen("auto", micro_steps=FEW, before=compiled) == (True, True)
    assert chosen("auto", micro_steps=MANY, before=plain) == (False, True)


def test_what_is_asked_for_is_done_or_refused() -> None:
    assert chosen("off", micro_steps=MANY) == (False, False)
    assert chosen("graph", micro_steps=MANY) == (False, True)
    assert chosen("blocks") == (True, True)
    assert chosen("blocks", device=CPU) == (True, False)
    for words, reason in (
        ({"device": CPU}, "--compile graph: it needs a GPU: leave it out"),
        ({"plan": FROM_FILES}, "--compile graph: the host reads what visits the device from files"),
        ({"plan": TIGHT}, "--compile graph: its graph may not fit into the budget"),
        ({"dropout": 0.1}, "--compile graph: dropout is drawn by the host"),
    ):
        with pytest.raises(UserError, match=reason):
            chosen("graph", **words)
    for plan in (STREAMED, NF4):
        with pytest.raises(UserError, match=r"--compile blocks: .*: leave it out"):
            chosen("blocks", plan=plan)


def test_compiled_blocks_are_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, with autograd's graph cut as the compiler cuts it; no C++ compiler is needed for that."""
    plain, compiled = make_transformer(), make_transformer()
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: original(block, backend="aot_eager"))
    compile_blocks(compiled, asked=True)
    assert all(block._compiled_call_impl is not None for block in compiled.transformer_blocks)
    outputs = []
    for transformer in (plain, compiled):
        output = transformer(**inputs(0, CPU), return_dict=False)[0]
        output.square().mean().backward()
        outputs.append(output)
    assert torch.allclose(*outputs, atol=1e-5)
    for mine, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)


def test_blocks_are_compiled_whatever_was_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import _dynamo

    sizes: list[list[int]] = []

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> torch.fx.GraphModule:
        sizes.append([size for example in examples for size in example.shape])
        return graph

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: original(block, backend=backend))
    counts = []
    with _dynamo.config.patch(recompile_limit=5):  # of a run there are four kinds
        for step in (0, 2, 0, 2):  # of other numbers of tokens
            transformer = make_transformer()
            compile_blocks(transformer, asked=True)
            transformer(**inputs(step, CPU))
            counts.append(len(sizes))
    assert counts == [4, 8, 12, 16]
    assert all(isinstance(size, int) for found in sizes for size in found)  # none is a symbol


def test_the_flag_reaches_the_blocks_and_a_resumed_run_keeps_it(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(training_script(), "compile_blocks", lambda _, asked: compiled.append(asked))
    resume = ["--resume_from_checkpoint", "latest"]
    plain = train(script, prepared, tmp_path / "plain")
    assert "each micro-step: plain kernels, started one by one\n" in plain.out
    assert compiled == []
    run = train(script, prepared, tmp_path / "run", "--compile", "blocks")
    assert "each micro-step: blocks compiled, started one by one\n" in run.out
    assert compiled == [True]
    train(script, prepared, tmp_path / "run", *resume, "--max_train_steps", 4)
    assert compiled == [True, False]  # for the same numbers; nobody asked this time
    refused = train(script, prepared, tmp_path / "run", *resume, "--compile", "off", "--max_train_steps", 5, code=2)
    assert "was trained with --compile blocks, not off or graph: " in refused.error
    assert (
        "--compile graph: it needs a GPU" in train(script, prepared, tmp_path / "g", "--compile", "graph", code=2).error
    )


def test_a_run_that_may_record_its_steps_does(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the recorder, as there is no GPU: every micro-step goes through it, its loss comes out."""
    steps: list[int] = []

    class Recorder(CapturedCall):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            (gradient,) = self._changed
            assert not gradient.any() or len(steps) % 2
            steps.append(len(inputs))
            return self._compute(*inputs)

    words = ["--gradient_accumulation_steps", 2]
    plain = train(script, prepared, tmp_path / "plain", *words)
    recorded = StepExecution(compiled=False, captured=True, asked=False)
    monkeypatch.setattr(training_script(), "choose_execution", lambda *_: recorded)
    monkeypatch.setattr(training_script(), "CapturedCall", Recorder)
    run = train(script, prepared, tmp_path / "recorded", *words)
    assert steps == [7] * 6
    assert run.losses == plain.losses
    noted = json.loads((run.folder / "run.json").read_text())["execution"]
    assert not noted["captured"]  # the stand-in captured nothing, whatever was chosen


# What came of it


@pytest.mark.parametrize("compiles", [True, False])
def test_blocks_that_did_not_compile_are_not_said_to_be(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    """Where nobody asked, torch runs as it is what does not compile."""

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        if not compiles:
            raise RuntimeError("no compiler")
        return graph

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: original(block, backend=backend))
    chosen = StepExecution(compiled=True, captured=False, asked=False)
    transformer = make_transformer()
    compile_blocks(transformer, asked=False)
    transformer(**inputs(0, CPU))
    assert chosen.in_force(None).compiled is compiles


@pytest.mark.parametrize(("captured", "refusal"), [(True, None), (False, "CUDA out of memory")])
def test_a_graph_that_could_not_be_captured_is_not_said_to_be(captured: bool, refusal: str | None) -> None:
    call = CapturedCall(lambda: torch.zeros(()), CPU)
    call.captured, call.refusal = captured, refusal
    chosen = StepExecution(compiled=False, captured=True, asked=False)
    assert chosen.in_force(call) == StepExecution(False, captured, False, refusal)
