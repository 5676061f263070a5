"""What --compile and --capture come to, and that a captured or compiled step is the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import DeviceConfig
from sd3_lora.common.placement_flags import StepFlags
from sd3_lora.common.records import StepInputs
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.gpu.forecast import Forecast
from sd3_lora.plan.memory_plan import Plan
from sd3_lora.plan.step_execution import (
    CAPTURE_FROM_CALLS,
    COMPILE_FROM_MICRO_STEPS,
    COMPILE_FROM_TOKENS,
    AskedExecution,
    StepExecution,
    choose_drawing_execution,
    choose_execution,
)
from sd3_lora.transformer.compiled import Compiled, compile_blocks, start_compile_workers, uncompiled
from sd3_lora.transformer.placement import Placement

import pytest
import torch
from conftest import Prepared
from small_transformer import CPU, GPU, inputs, make_transformer
from training_runs import Script, train, training_script

STREAMS = ("hidden_states", "encoder_hidden_states")
RESIDENT = Plan(Placement(24), Forecast())


def placed(**changes: object) -> Plan:
    """The resident plan with a placement that differs from it."""
    return replace(RESIDENT, placement=replace(RESIDENT.placement, **changes))


STREAMED, NF4 = placed(streamed=(0, 1), buffers=2), placed(precision="nf4")
FROM_FILES = placed(streamed=(0, 1), buffers=2, stream_from="files")
TIGHT = replace(STREAMED, forecast=Forecast(has_room_for_graph=False))
MANY, FEW = COMPILE_FROM_MICRO_STEPS, COMPILE_FROM_MICRO_STEPS - 1


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3_lora.plan.step_execution.has_triton", lambda: True)


def chosen(
    compile="auto", capture="auto", plan=RESIDENT, device=GPU, dropout=0.0, micro_steps=FEW, before=None
) -> tuple[bool, bool]:
    """Whether blocks are compiled, and whether the step is captured."""
    execution = execute(compile, capture, plan, device, dropout, micro_steps, before)
    return execution.compiled is not Compiled.NO, execution.captured


def execute(
    compile="auto",
    capture="auto",
    plan=RESIDENT,
    device=GPU,
    dropout=0.0,
    micro_steps=FEW,
    before=None,
    deterministic="auto",
):
    flags = StepFlags(compile=compile, capture=capture)
    must_be_deterministic = DeviceConfig(deterministic=deterministic).must_be_deterministic
    asked = AskedExecution(flags.must_compile, flags.must_capture, must_be_deterministic)
    return choose_execution(asked, plan, device, dropout, micro_steps, before)


def test_auto_captures_what_a_graph_can_hold() -> None:
    assert chosen() == (False, True)
    assert chosen(plan=NF4) == (False, True)
    assert chosen(plan=STREAMED) == (False, True)
    assert chosen(plan=placed(recomputed=(0, 1), offload_inputs=True)) == (False, True)
    assert chosen(plan=FROM_FILES) == (False, False)
    assert chosen(plan=TIGHT) == (False, True)  # is tried
    assert chosen(dropout=0.1) == (False, False)
    assert chosen(device=CPU) == (False, False)


def test_auto_compiles_where_the_steps_repay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(micro_steps=MANY) == (True, True)
    assert chosen(micro_steps=MANY, dropout=0.1) == (True, False)
    for plan in (STREAMED, NF4):
        assert not chosen(plan=plan, micro_steps=MANY)[0]
    assert chosen(micro_steps=MANY, device=CPU) == (False, False)
    assert execute(micro_steps=MANY).compiled is Compiled.WHERE_POSSIBLE
    monkeypatch.setattr("sd3_lora.plan.step_execution.has_triton", lambda: False)
    assert chosen(micro_steps=MANY) == (False, True)


def test_deterministic_runs_are_not_compiled() -> None:
    """Compiled anew, a block of SD3 gave other last bits on an H200."""
    assert execute(micro_steps=MANY, deterministic="on").compiled is Compiled.NO
    assert execute(micro_steps=MANY, deterministic="off").compiled is Compiled.WHERE_POSSIBLE
    with pytest.raises(UserError, match=r"^--compile on: .* which --deterministic on rules out: leave one out$"):
        execute("on", deterministic="on")


def test_auto_keeps_a_resumed_runs_numbers() -> None:
    compiled = execute(micro_steps=MANY).kernels
    plain = execute(micro_steps=FEW).kernels
    assert plain == execute("off", "off", micro_steps=MANY).kernels  # a graph's kernels are the plain ones
    assert compiled == execute("on", micro_steps=FEW).kernels
    assert (compiled, plain) == ("blocks", "off or graph")  # as checkpoints of earlier builds have them
    assert chosen(micro_steps=FEW, before=compiled) == (True, True)
    assert chosen(micro_steps=MANY, before=plain) == (False, True)


def test_blocks_that_are_called_without_their_lora_too_are_captured_and_not_compiled() -> None:
    for compile_asked in (None, False):
        execution = choose_execution(AskedExecution(compile_asked, base_pass=True), RESIDENT, GPU, 0.0, MANY)
        assert (execution.compiled, execution.captured) == (Compiled.NO, True)
    with pytest.raises(UserError, match=r"^--compile on: blocks that --prior_term calls with and without their LoRA "):
        choose_execution(AskedExecution(True, base_pass=True), RESIDENT, GPU, 0.0, FEW)


def test_drawing_is_captured_and_compiled_where_the_pictures_repay_it() -> None:
    def draws(
        plan=RESIDENT, device=GPU, tokens=COMPILE_FROM_TOKENS, calls=CAPTURE_FROM_CALLS, several=False, **asked
    ) -> tuple[bool, bool]:
        execution = choose_drawing_execution(AskedExecution(**asked), plan, device, calls, tokens, several)
        return execution.compiled is not Compiled.NO, execution.captured

    assert draws() == (True, True)
    assert draws(tokens=COMPILE_FROM_TOKENS - 1) == (False, True)
    assert draws(tokens=1, compile=True) == (True, True)
    assert draws(compile=False, capture=False) == (False, False)
    assert draws(calls=CAPTURE_FROM_CALLS - 1) == (True, False)
    assert draws(calls=1, capture=True) == (True, True)
    assert draws(NF4) == draws(STREAMED, capture=True) == (False, True)
    assert draws(STREAMED) == (False, False)
    assert draws(FROM_FILES) == draws(device=CPU) == (False, False)
    assert draws(deterministic=True) == draws(several=True) == (False, True)
    sentence = r"^--compile on: blocks beside which LoRAs change their strength are not compiled: leave one out$"
    with pytest.raises(UserError, match=sentence):
        draws(several=True, compile=True)
    with pytest.raises(UserError, match=r"^--capture on: the host reads streamed blocks from files: leave it out$"):
        draws(FROM_FILES, capture=True)


def test_what_is_asked_for_is_done_or_refused() -> None:
    assert chosen("off", "off", micro_steps=MANY) == (False, False)
    assert chosen("off", micro_steps=MANY) == (False, True)
    assert chosen("off", "on", micro_steps=MANY) == (False, True)
    assert chosen("on") == (True, True)
    assert chosen("on", "off") == (True, False)
    assert chosen("on", device=CPU) == (True, False)
    assert execute("on").compiled is Compiled.ALWAYS
    assert [execute(capture=asked).must_capture for asked in ("auto", "on", "off")] == [False, True, False]
    for changes, reason in (
        ({"device": CPU}, "--capture on: it needs a GPU: leave it out"),
        ({"plan": FROM_FILES}, "--capture on: the host reads streamed blocks from files: leave it out"),
        ({"plan": TIGHT}, "--capture on: its graph may not fit into the budget: leave it out"),
        ({"dropout": 0.1}, "--capture on: dropout is drawn by the host: leave it out"),
    ):
        with pytest.raises(UserError, match=f"^{reason}$"):
            chosen("off", "on", **changes)
    for plan, reason in ((STREAMED, "streamed blocks"), (NF4, "4-bit weights")):
        with pytest.raises(UserError) as error:
            chosen("on", plan=plan)
        assert str(error.value) == (
            f"--compile on: {reason} are not compiled: leave it out, or keep all blocks on the device in 16 bits"
        )


@pytest.mark.parametrize(("older", "now"), [("graph", ("off", "on")), ("blocks", ("on", "auto"))])
def test_older_spellings_are_still_obeyed(older: str, now: tuple[str, str]) -> None:
    for micro_steps in (FEW, MANY):
        assert execute(older, micro_steps=micro_steps) == execute(*now, micro_steps=micro_steps)


def test_compiled_blocks_are_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, with autograd's graph cut as the compiler cuts it; no C++ compiler is needed for that."""
    plain, compiled = make_transformer(), make_transformer()
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: original(block, backend="aot_eager"))
    compile_blocks(compiled, Compiled.ALWAYS)
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
    with _dynamo.config.patch(recompile_limit=4):  # of a run there are three kinds
        for step in (0, 2, 0, 2):  # of other numbers of tokens
            transformer = make_transformer()
            compile_blocks(transformer, Compiled.ALWAYS)
            transformer(**inputs(step, CPU))
            counts.append(len(sizes))
    assert counts == [3, 6, 9, 12]
    assert all(isinstance(size, int) for found in sizes for size in found)  # none is a symbol


@pytest.mark.parametrize("compiled", [Compiled.ALWAYS, Compiled.NO])
def test_what_is_drawn_between_the_steps_compiles_nothing(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> None:
    """Other shapes would have torch compile for any shape, and so change the steps' numbers."""
    runs: list[list[int]] = []

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*words: Any) -> Any:
            runs.append([size for example in examples for size in example.shape])
            return graph(*words)

        return run

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: original(block, backend=backend))
    transformer = make_transformer()
    if compiled is not Compiled.NO:
        compile_blocks(transformer, compiled)
    for step in (0, 2, 0):  # of other numbers of tokens
        count = len(runs)
        with uncompiled(compiled) if step == 2 else nullcontext():
            transformer(**inputs(step, CPU))
        assert len(runs) - count == (6 if step == 0 and compiled is not Compiled.NO else 0)
    assert all(isinstance(size, int) for run in runs for size in run)  # none is a symbol


@pytest.mark.parametrize(("trained", "has_gradient"), [((0, 1, 2, 3, 4, 5), True), ((4, 5), False)])
def test_the_first_blocks_input_has_a_gradient_where_the_block_is_trained(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[int, ...], has_gradient: bool
) -> None:
    """So that it is of the kind of those after it. Blocks before the first trained one need no backward at all."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)

    def gradients(compiled: Compiled) -> dict[str, torch.Tensor | None]:
        transformer, given = make_transformer(), list[bool]()
        for name, parameter in transformer.named_parameters():
            is_trained = name.startswith(tuple(f"transformer_blocks.{block}." for block in trained))
            parameter.requires_grad_(parameter.requires_grad and is_trained)
        if compiled is not Compiled.NO:
            compile_blocks(transformer, compiled)
        transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda _, __, words: given.extend(words[name].requires_grad for name in STREAMS), with_kwargs=True
        )
        transformer(**inputs(0, CPU), return_dict=False)[0].square().mean().backward()
        assert given == [compiled is not Compiled.NO and has_gradient] * 2
        return {name: parameter.grad for name, parameter in transformer.named_parameters()}

    plain, compiled = gradients(Compiled.NO), gradients(Compiled.ALWAYS)
    for name, gradient in plain.items():
        other = compiled[name]
        assert (gradient is None) == (other is None)
        assert gradient is None or other is None or torch.equal(gradient, other)


@pytest.mark.parametrize(
    ("compiled", "device", "started"),
    [(Compiled.ALWAYS, GPU, 1), (Compiled.WHERE_POSSIBLE, GPU, 1), (Compiled.NO, GPU, 0), (Compiled.ALWAYS, CPU, 0)],
)
def test_compile_workers_are_started_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, compiled: Compiled, device: torch.device, started: int
) -> None:
    from torch._inductor import async_compile

    calls: list[None] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: calls.append(None))
    start_compile_workers(compiled, device)
    assert len(calls) == started


def test_the_flag_reaches_the_blocks_and_a_resumed_run_keeps_it(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Compiled] = []
    monkeypatch.setattr("sd3_lora.transformer.placement.compile_blocks", lambda _, how: compiled.append(how))
    resume = ["--resume_from_checkpoint", "latest"]
    plain = train(script, prepared, tmp_path / "plain")
    assert "each micro-step: plain blocks, launched kernel by kernel\n" in plain.out
    assert compiled == []
    run = train(script, prepared, tmp_path / "run", "--compile", "on")
    assert "each micro-step: compiled blocks, launched kernel by kernel\n" in run.out
    assert compiled == [Compiled.ALWAYS]
    train(script, prepared, tmp_path / "run", *resume, "--max_train_steps", 4)
    assert compiled == [Compiled.ALWAYS, Compiled.WHERE_POSSIBLE]  # for the same numbers; no flag this time
    refused = train(script, prepared, tmp_path / "run", *resume, "--compile", "off", "--max_train_steps", 5, code=2)
    assert "was trained with compiled blocks: type --compile on" in refused.error
    refused = train(script, prepared, tmp_path / "g", "--capture", "on", code=2)
    assert refused.error == "--capture on: it needs a GPU: leave it out"


def test_a_run_that_may_capture_its_steps_does(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the graph, as there is no GPU: every micro-step goes through it, its loss comes out."""
    steps: list[int] = []

    class Captured(CapturedCall):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            (gradient,) = self._changed
            assert not gradient.any() or len(steps) % 2
            steps.append(len(inputs))
            return self._compute(*inputs)

    words = ["--gradient_accumulation_steps", 2]
    plain = train(script, prepared, tmp_path / "plain", *words)
    captured = StepExecution(Compiled.NO, captured=True, must_capture=False)
    monkeypatch.setattr(training_script(), "choose_execution", lambda *_: captured)
    monkeypatch.setattr(training_script(), "CapturedCall", Captured)
    run = train(script, prepared, tmp_path / "captured", *words)
    assert steps == [len(StepInputs._fields)] * 6
    assert run.losses == plain.losses
    noted = json.loads((run.folder / "run.json").read_text())["execution"]
    assert not noted["captured"]  # the stand-in captured nothing, whatever was chosen


# What came of it


@pytest.mark.parametrize("compiles", [True, False])
def test_blocks_that_did_not_compile_are_not_said_to_be(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    """Without a flag, what does not compile runs uncompiled."""

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        if not compiles:
            raise RuntimeError("no compiler")
        return graph

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: original(block, backend=backend))
    chosen = StepExecution(Compiled.WHERE_POSSIBLE, captured=False, must_capture=False)
    transformer = make_transformer()
    compile_blocks(transformer, Compiled.WHERE_POSSIBLE)
    transformer(**inputs(0, CPU))
    assert chosen.carried_out(None).to_dict()["compiled"] is compiles


@pytest.mark.parametrize(("captured", "refusal"), [(True, None), (False, "CUDA out of memory")])
def test_a_graph_that_could_not_be_captured_is_not_said_to_be(captured: bool, refusal: str | None) -> None:
    call = CapturedCall(lambda: torch.zeros(()), CPU)
    call.captured, call.refusal = captured, refusal
    chosen = StepExecution(Compiled.NO, captured=True, must_capture=False)
    assert chosen.carried_out(call) == StepExecution(Compiled.NO, captured, False, refusal)
