"""What --compile comes to, and that a recorded or compiled step is the step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

from sd3_lora.checkpointing import checkpoint_blocks
from sd3_lora.command_line import UserError
from sd3_lora.memory_plan import plain_plan
from sd3_lora.optimizer import flatten_parameters
from sd3_lora.step_execution import (
    COMPILE_FROM_MICRO_STEPS,
    RecordedStep,
    StepExecution,
    choose_execution,
    compile_blocks,
)
from sd3_lora.streaming import stream_transformer

import pytest
import torch
from conftest import Prepared
from small_transformer import CPU, GPU, inputs, make_transformer, needs_gpu
from training_runs import Script, train, training_script

RESIDENT = plain_plan(24, "16bit", False)
STREAMED, NF4 = replace(RESIDENT, visiting=(0, 1), buffers=2), replace(RESIDENT, base_precision="nf4")
FROM_FILES, TIGHT = replace(STREAMED, from_files=True), replace(STREAMED, has_room_for_graph=False)
MANY, FEW = COMPILE_FROM_MICRO_STEPS, COMPILE_FROM_MICRO_STEPS - 1


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3_lora.step_execution._has_triton", lambda: True)


def chosen(asked, plan=RESIDENT, device=GPU, dropout=0.0, micro_steps=FEW, before=None) -> tuple[bool, bool]:
    execution = choose_execution(asked, plan, device, dropout, micro_steps, before)
    return execution.compiled, execution.recorded


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
    monkeypatch.setattr("sd3_lora.step_execution._has_triton", lambda: False)
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

    class Recorder(RecordedStep):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            assert not self._gradient.any() or len(steps) % 2
            steps.append(len(inputs))
            return self._compute(*inputs)

    words = ["--gradient_accumulation_steps", 2]
    plain = train(script, prepared, tmp_path / "plain", *words)
    recorded = StepExecution(compiled=False, recorded=True, asked=False)
    monkeypatch.setattr(training_script(), "choose_execution", lambda *_: recorded)
    monkeypatch.setattr(training_script(), "RecordedStep", Recorder)
    run = train(script, prepared, tmp_path / "recorded", *words)
    assert steps == [7] * 6
    assert run.losses == plain.losses


class NoGraph:
    """Stands for CUDA where a step cannot be recorded."""

    def __init__(self, *_: object, **__: object):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class NoMemory:
    """Stands for CUDA where memory runs out, and the recording then cannot be ended."""

    def __init__(self, *_: object, **__: object):
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory\nmore")
        finally:
            raise RuntimeError("capturing stream has unjoined work")


def tiny_step() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """The sum of `x`, weighted by three ones that are trained; and their gradient."""
    parameter = torch.nn.Parameter(torch.ones(3))
    flat = flatten_parameters([parameter])
    assert flat.grad is not None

    def compute(x: torch.Tensor) -> torch.Tensor:
        loss = (parameter * x).sum()
        loss.backward()
        return loss.detach()

    return compute, flat.grad


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [(NoGraph, "operation not permitted when stream is capturing"), (NoMemory, "CUDA out of memory")],
)
def test_a_step_that_cannot_be_recorded_is_computed(
    stand_in: type, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, gradient = tiny_step()
    monkeypatch.setattr(torch.cuda, "Stream", stand_in)
    said: list[str] = []
    step = RecordedStep(compute, gradient, asked=False, say=said.append)
    assert [step(torch.full((3,), value)).item() for value in (1.0, 2.0)] == [3.0, 6.0]
    assert gradient.tolist() == [3.0] * 3
    assert said == [f"not replayed as a graph ({reason}); kernels are started one by one"]
    with pytest.raises(RuntimeError, match="capturing"):
        RecordedStep(compute, gradient, asked=True)(torch.ones(3))


class FakeGraph:
    """Stands for a CUDA graph: replayed, the step is computed once more, or goes wrong."""

    error = 0.0

    def replay(self) -> None:
        self.step._loss = self.step._compute(*self.step._inputs)
        self.step._gradient += self.error


@pytest.mark.parametrize("error", [0.0, 0.001, 0.1])
@pytest.mark.parametrize("asked", [False, True])
def test_a_replay_that_gives_other_numbers_is_not_used(
    error: float, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, gradient = tiny_step()
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    said: list[str] = []
    step = RecordedStep(compute, gradient, asked, said.append)
    monkeypatch.setattr(FakeGraph, "error", error)
    monkeypatch.setattr(FakeGraph, "step", step, raising=False)
    if error > 0.01 and asked:
        with pytest.raises(RuntimeError, match="other numbers"):
            step(torch.full((3,), 2.0))
        return
    assert step(torch.full((3,), 2.0)).item() == 6.0
    assert gradient.tolist() == pytest.approx([2.0 + (error if error < 0.01 else 0)] * 3)
    reason = "its replay gives other numbers than the plain step"
    assert said == ([f"not replayed as a graph ({reason}); kernels are started one by one"] if error > 0.01 else [])


@needs_gpu
@pytest.mark.parametrize("full", [False, True], ids=["recorded", "out of memory"])
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize(("checkpointed", "offload"), [(0, False), (5, False), (5, True)])
def test_a_recorded_step_is_the_step_bit_for_bit(checkpointed: int, offload: bool, streamed: bool, full: bool) -> None:
    """As is the step that goes on when there is no memory for a graph."""
    results = []
    said: list[str] = []

    def run_out(*_: object) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    for recorded in (False, True):
        transformer = make_transformer(dtype=torch.float16)
        if streamed and recorded:
            stream_transformer(transformer, GPU)
        else:
            transformer.to(GPU)
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        flat = flatten_parameters(trained)
        checkpoint_blocks(transformer, checkpointed, offload)
        scaler = torch.amp.GradScaler("cuda")

        def compute(*words: torch.Tensor, transformer=transformer, scaler=scaler) -> torch.Tensor:
            names = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
            with torch.autocast("cuda", torch.float16):
                output = transformer(**dict(zip(names, words, strict=True)), return_dict=False)[0]
            loss = output.float().square().mean()
            scaler.scale(loss).backward()
            return loss.detach()

        assert flat.grad is not None
        if full:
            transformer.transformer_blocks[3].attn.register_forward_pre_hook(run_out)
        step = RecordedStep(compute, flat.grad, asked=not full, say=said.append) if recorded else compute
        optimizer = torch.optim.AdamW([flat], lr=0.01, fused=True)
        losses = []
        for number in (0, 1, 3, 4):  # 2 has another number of tokens
            losses.append(step(*inputs(number, GPU, torch.float16).values()))
            if number % 2:  # windows of two
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=False)
        results.append((torch.stack(losses), flat.detach().clone()))
    assert all(map(torch.equal, *results))
    assert [line[:44] for line in said] == (["not replayed as a graph (CUDA out of memory."] if full else [])
