"""A captured computation gives the plain one's numbers, bit for bit; what cannot be captured is computed plainly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import MagicMock

from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import stream_transformer

import pytest
import torch
from small_transformer import CPU, GPU, inputs, make_transformer, needs_gpu


class NoGraph:
    """Stands for CUDA where a step cannot be captured."""

    def __init__(self, *_: object, **__: object):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class NoMemory:
    """Stands for CUDA where memory runs out, and the capture then cannot be ended."""

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
def test_a_step_that_cannot_be_captured_is_computed(
    stand_in: type, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, gradient = tiny_step()
    monkeypatch.setattr(torch.cuda, "Stream", stand_in)
    said: list[str] = []
    step = CapturedCall(compute, CPU, [gradient], log=said.append)
    assert [step(torch.full((3,), value)).item() for value in (1.0, 2.0)] == [3.0, 6.0]
    assert gradient.tolist() == [3.0] * 3
    assert said == [f"not captured as a CUDA graph ({reason}): kernels are launched one by one"]
    assert (step.captured, step.refusal) == (False, reason)
    with pytest.raises(RuntimeError, match="capturing"):
        CapturedCall(compute, CPU, [gradient], asked=True)(torch.ones(3))


def test_a_capture_that_fails_waits_for_its_copies_before_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else CUDA could not end it; and what failed is what is said, whatever its end says."""
    events: list[str] = []

    class Recording:
        def __enter__(self) -> None:
            events.append("begun")

        def __exit__(self, *_: object) -> None:
            events.append("ended")
            raise RuntimeError("capturing stream has unjoined work")

    def compute(x: torch.Tensor) -> torch.Tensor:
        if events == ["begun"]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Recording())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr("sd3_lora.gpu.cuda_graph.join_captured_copies", lambda: events.append("joined"))
    said: list[str] = []
    assert CapturedCall(compute, CPU, log=said.append)(torch.ones(2)).tolist() == [2.0, 2.0]
    assert events == ["begun", "joined", "ended"]
    assert said == ["not captured as a CUDA graph (CUDA out of memory): kernels are launched one by one"]


class FakeGraph:
    """Stands for a CUDA graph: replayed, the step is computed once more, or goes wrong."""

    error = 0.0

    def replay(self) -> None:
        self.step._result = self.step._compute(*self.step._inputs)
        self.step._changed[0].add_(self.error)


@pytest.mark.parametrize("error", [0.0, 0.001, 0.1])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_replay_that_gives_other_numbers_is_not_used(
    error: float, asked: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = 1e-9 if exact else 0.01
    compute, gradient = tiny_step()
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    said: list[str] = []
    step = CapturedCall(compute, CPU, [gradient], asked, said.append, exact)
    monkeypatch.setattr(FakeGraph, "error", error)
    monkeypatch.setattr(FakeGraph, "step", step, raising=False)
    if error > tolerance and asked:
        with pytest.raises(RuntimeError, match="other numbers"):
            step(torch.full((3,), 2.0))
        return
    assert step(torch.full((3,), 2.0)).item() == 6.0
    assert step.captured is (error < tolerance)
    assert gradient.tolist() == pytest.approx([2.0 + (error if error < tolerance else 0)] * 3)
    reason = "its replay gives other numbers than the plain computation"
    refusal = f"not captured as a CUDA graph ({reason}): kernels are launched one by one"
    assert said == ([refusal] if error > tolerance else [])


def test_a_last_batch_of_another_size_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is freed first: both would not fit."""
    calls: list[object] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 2 * x

    double = CapturedCall(compute, CPU)
    graph = MagicMock()
    graph.replay.side_effect = lambda: double._result.copy_(2 * double._inputs[0])
    double._graph, double._inputs, double._result = graph, (torch.zeros(4),), torch.zeros(4)
    monkeypatch.setattr("sd3_lora.gpu.cuda_graph.free_memory", lambda _: calls.append("freed"))
    kept = double(torch.full((4,), 3.0))
    assert double(torch.full((4,), 5.0)).tolist() == [10.0] * 4
    assert kept.tolist() == [6.0] * 4  # no replay writes over it
    assert calls == []
    assert double(torch.ones(3)).tolist() == [2.0] * 3
    assert double(torch.ones(4)).tolist() == [2.0] * 4
    assert calls == ["freed", 3, 4]
    assert graph.replay.call_count == 2


@needs_gpu
def test_a_gpu_replays_what_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left of it on the GPU when the inputs have another shape."""
    weight = torch.randn(64, 64, device=GPU)
    compute = MagicMock(side_effect=lambda x: (x @ weight).relu())
    captured = CapturedCall(compute, GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    for rows in (8, 8, 8, 5, 8):
        x = torch.randn(rows, 64, device=GPU, generator=generator)
        assert torch.equal(captured(x), (x @ weight).relu())
    assert compute.call_count == 2 + 2  # once plainly and once captured; then the last two


@needs_gpu
@pytest.mark.parametrize("full", [0, 1, 2], ids=["captured", "out of memory", "out of memory in backward"])
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize(("recomputed", "offload"), [(0, False), (5, False), (5, True)])
def test_a_captured_step_is_the_step_bit_for_bit(recomputed: int, offload: bool, streamed: bool, full: int) -> None:
    """As is the step that goes on when there is no memory for a graph, of which then nothing is left."""
    if full == 2 and not recomputed:
        pytest.skip("no block runs in backward")
    results = []
    said: list[str] = []
    runs: list[int] = []

    def run_out(*_: object) -> None:
        if torch.cuda.is_current_stream_capturing():
            runs.append(1)
            if len(runs) == full:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    drop_workspaces(GPU)
    free_memory(GPU)
    reserved, stream = torch.cuda.memory_reserved(), torch.cuda.current_stream()

    for captured in (False, True):
        transformer = make_transformer(dtype=torch.float16)
        if streamed and captured:
            stream_transformer(transformer, GPU)
        else:
            transformer.to(GPU)
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        flat = flatten_parameters(trained)
        recompute_blocks(transformer, range(recomputed), offload)
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
        step = CapturedCall(compute, GPU, [flat.grad], not full, said.append) if captured else compute
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
    assert [line[:49] for line in said] == (["not captured as a CUDA graph (CUDA out of memory."] if full else [])
    assert torch.cuda.current_stream() == stream
    torch.rand(1, device=GPU)  # refused while a generator is registered with a capture
    del transformer, step, compute, optimizer, scaler, trained, flat, parameter
    drop_workspaces(GPU)
    free_memory(GPU)
    assert torch.cuda.memory_reserved() <= reserved + 4 * 1024**2  # the results
