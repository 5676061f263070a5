"""A captured computation gives the plain one's numbers, bit for bit; what cannot be captured is computed plainly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import MagicMock

from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.gpu.cuda_graph import CapturedCall, call_in_capture
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import stream_transformer

import pytest
import torch
from fake_cuda import FakeCuda
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
    assert (step.captured, step.gave_up, step.refusal) == (False, True, reason)
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


@pytest.mark.parametrize("error", [0.0, 0.001, 0.1])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_replay_that_gives_other_numbers_is_not_used(
    error: float, asked: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = 1e-9 if exact else 0.01
    compute, gradient = tiny_step()
    said: list[str] = []
    step = CapturedCall(FakeCuda(monkeypatch, compute, [gradient], error), CPU, [gradient], asked, said.append, exact)
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
    fake = FakeCuda(monkeypatch, lambda x: 2 * x)
    double = CapturedCall(fake, CPU)
    kept = double(torch.full((4,), 3.0))
    assert fake.events == ["compute 4", "freed", "capture 4", "replay 4", "replay 4"]
    fake.events.clear()
    assert double(torch.full((4,), 5.0)).tolist() == [10.0] * 4
    assert kept.tolist() == [6.0] * 4  # no replay writes over it
    assert double(torch.ones(3)).tolist() == [2.0] * 3
    assert double(torch.ones(4)).tolist() == [2.0] * 4
    assert fake.events == ["replay 4", "freed", "compute 3", "compute 4"]


# Several shapes


def sum_of_squares() -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """Of rows times a trained number; and its gradient. The second input has one shape, whatever the first's."""
    parameter = torch.nn.Parameter(torch.ones(()))
    flat = flatten_parameters([parameter])
    assert flat.grad is not None

    def compute(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        loss = (parameter * rows * factor).square().sum()
        loss.backward()
        return loss.detach()

    return compute, flat.grad


def test_several_shapes_have_a_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are the plain ones', also where a shape first comes amid a window of accumulated gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = [4, 4, 6, 4, 2, 6, 4, 2, 2, 6, 4]
    batches = [(torch.randn(size, generator=generator), torch.randn(1, generator=generator)) for size in sizes]
    outcomes = []
    for captured in (False, True):
        compute, gradient = sum_of_squares()
        if captured:
            fake = FakeCuda(monkeypatch, compute, [gradient])
            step = CapturedCall(fake, CPU, [gradient], most_shapes=3)
        losses, gradients = [], []
        for number, batch in enumerate(batches):
            losses.append((step if captured else compute)(*batch))
            if number % 3 == 2:  # windows of three
                gradients.append(gradient.clone())
                gradient.zero_()
        outcomes.append((losses, gradients))
    assert outcomes[0] == outcomes[1]
    first = lambda size: [f"compute {size}", "freed", f"capture {size}", f"replay {size}", f"replay {size}"]  # noqa: E731
    assert fake.events == [
        *first(4),
        "replay 4",
        "freed", *first(6),  # a new shape is computed without graphs
        "capture 4", "replay 4",  # captured again beside the larger one
        "freed", *first(2),
        "freed", "capture 6", "replay 6",  # larger than what is there: it comes first
        "capture 4", "replay 4",
        "capture 2", "replay 2",
        "replay 2", "replay 6", "replay 4",
    ]  # fmt: skip
    pools = [graph.memory for graph in fake.graphs]
    assert pools[-3] is pools[-2] is pools[-1]
    assert [len(graph.inputs[0]) for graph in fake.graphs[-3:]] == [6, 4, 2]
    assert fake.graphs[-3].inputs[1] is fake.graphs[-1].inputs[1]  # of one shape in all: read from one memory


@pytest.mark.parametrize("most_shapes", [1, 2])
def test_a_graph_that_is_replayed_is_not_freed(most_shapes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its memory was unmapped while its kernels ran."""
    fake = FakeCuda(monkeypatch, lambda x: 2 * x)
    double = CapturedCall(fake, CPU, most_shapes=most_shapes)
    double(torch.ones(4))
    fake.events.clear()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: fake.events.append("waited"))
    double(torch.ones(4))
    double(torch.ones(3))
    assert fake.events[:4] == ["replay 4", "waited", "freed", "compute 3"]


def test_who_is_captured_is_known_while_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        seen.append(call_in_capture())
        return 2 * x

    double = CapturedCall(FakeCuda(monkeypatch, compute), CPU)
    double(torch.ones(2))
    assert seen[:2] == [None, double]  # plainly, then captured
    assert call_in_capture() is None


def test_one_shape_too_many_ends_the_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, lambda x: 2 * x)
    double = CapturedCall(fake, CPU, most_shapes=2)
    for size in (4, 3, 4, 3):
        assert double(torch.ones(size)).tolist() == [2.0] * size
        assert not double.gave_up
    fake.events.clear()
    for size in (5, 4, 3):
        assert double(torch.ones(size)).tolist() == [2.0] * size
        assert double.gave_up
    assert fake.events == ["freed", "compute 5", "compute 4", "compute 3"]


def test_a_shape_that_cannot_be_captured_ends_the_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the window's earlier micro-steps stay."""
    compute, gradient = sum_of_squares()
    fake = FakeCuda(monkeypatch, compute, [gradient])
    said: list[str] = []
    step = CapturedCall(fake, CPU, [gradient], log=said.append, most_shapes=2)
    one = torch.ones(1)
    step(torch.ones(4), one)
    fake.error = 1.0
    step(torch.ones(2), one)
    assert gradient.item() == 2 * 4 + 2 * 2
    assert len(said) == 1
    step(torch.ones(4), one)
    assert gradient.item() == 2 * 4 + 2 * 2 + 2 * 4
    assert fake.events[-2:] == ["compute 2", "compute 4"]


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
def test_a_gpu_replays_several_shapes_from_one_pool() -> None:
    """The pool takes what the largest needs, and little more."""
    weight = torch.randn(512, 512, device=GPU, requires_grad=True)
    flat = flatten_parameters([weight])
    assert flat.grad is not None

    def compute(x: torch.Tensor) -> torch.Tensor:
        loss = ((x @ weight).relu() @ weight).square().mean()
        loss.backward()
        return loss.detach()

    generator = torch.Generator(GPU).manual_seed(0)
    batches = [torch.randn(rows, 512, device=GPU, generator=generator) for rows in (4096, 16384, 8192) * 3]
    expected = [compute(batch) for batch in batches]
    gradient = flat.grad.clone()
    reserved = []
    for each in ([batches[1]], batches):
        flat.grad.zero_()
        drop_workspaces(GPU)
        free_memory(GPU)
        step = CapturedCall(compute, GPU, [flat.grad], True, exact=True, most_shapes=3)
        results = [step(batch) for batch in each]
        reserved.append(torch.cuda.memory_reserved())
    assert all(map(torch.equal, results, expected))
    assert torch.equal(flat.grad, gradient)
    assert reserved[1] <= reserved[0] + 64 * 1024**2  # the inputs that the graphs read


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


@needs_gpu
def test_a_released_graph_gives_its_memory_back_and_is_captured_again() -> None:
    """Between two steps something else needs the memory; the steps' numbers are those of a run without."""
    weight = torch.randn(256, 256, device=GPU)
    gradient = torch.zeros_like(weight)

    def compute(x: torch.Tensor) -> torch.Tensor:
        hidden = (x @ weight).relu().repeat(64, 1)
        gradient.add_(hidden.t() @ hidden)
        return hidden.sum()

    results = []
    for releases in (False, True):
        gradient.zero_()
        call = CapturedCall(compute, GPU, [gradient], asked=True, exact=True)
        values = []
        for step in range(3):
            torch.manual_seed(step)
            values.append(call(torch.randn(256, 256, device=GPU)).clone())
            if releases:
                held = torch.cuda.memory_reserved()
                call.release()
                assert torch.cuda.memory_reserved() < held
                torch.randn(1024, 1024, device=GPU)  # something else
        assert call.captured
        results.append((torch.stack(values), gradient.clone()))
    assert all(map(torch.equal, *results))
