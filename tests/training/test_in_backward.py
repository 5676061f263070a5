"""AdamW inside the backward pass, beside torch's AdamW in float32."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.training.blockwise_adam import Moments, Settings, Table, new_moments, state_bytes
from sd3_lora.training.in_backward import AdamInBackward, update_bytes, whole_bytes

import pytest
import torch
from fake_cuda import FakeCuda
from small_transformer import GPU, needs_gpu

CPU = torch.device("cpu")
RATE, DECAY, STEPS = 1e-3, 0.1, 30
NO_CLIPPING = Settings((0.9, 0.999), 1e-8, math.inf)
# In 8 bits with and without a last block that is not whole; and small, in 32 bits.
SHAPES = {"large": (80, 64), "odd": (4099,), "small": (7, 5)}


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def backward(weights: dict[str, torch.nn.Parameter], wanted: dict[str, torch.Tensor]) -> None:
    """Gives each weight this gradient, by a backward pass."""
    torch.stack([(weights[name] * wanted[name].to(weights[name].dtype)).sum() for name in wanted]).sum().backward()


def optimizer_of(weights: dict[str, torch.nn.Parameter], settings: Settings = NO_CLIPPING, window: int = 1):
    return AdamInBackward(weights, RATE, DECAY, settings, seed=3, window=window)


def train(optimizer: AdamInBackward, weights: dict[str, torch.nn.Parameter], steps: Sequence[int]) -> None:
    for step in steps:
        optimizer.begin(step, RATE)
        backward(weights, gradients(step))
        optimizer.step()


def reference(dtype: torch.dtype, max_norm: float = math.inf) -> dict[str, torch.Tensor]:
    """A plain float32 loop with the gradients that weights of this dtype have."""
    weights = {name: torch.nn.Parameter(weight.detach().float()) for name, weight in parameters(dtype).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=DECAY)
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient.to(dtype).float()
            torch.nn.utils.clip_grad_norm_([weights[name]], max_norm)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def moved(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return after.detach().float() - before.detach().float()


@pytest.mark.parametrize("max_norm", [math.inf, 0.5])
def test_float32_weights_are_those_of_a_plain_loop(max_norm: float) -> None:
    """Small tensors to float32's roundings; of those in 8 bits the whole movement to 7 %."""
    weights, before = parameters(torch.float32), parameters(torch.float32)
    train(optimizer_of(weights, Settings((0.9, 0.999), 1e-8, max_norm)), weights, range(1, STEPS + 1))
    for name, expected in reference(torch.float32, max_norm).items():
        assert weights[name].grad is None  # applied and freed
        ours, theirs = moved(weights[name], before[name]), moved(expected, before[name])
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-4 if name == "small" else 0.07), name


def test_bfloat16_weights_are_those_of_a_plain_loop_on_average() -> None:
    weights, before = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(optimizer_of(weights), weights, range(1, STEPS + 1))
    for name in ("large", "odd"):
        assert weights[name].dtype == torch.bfloat16
        ours, theirs = moved(weights[name], before[name]), moved(reference(torch.bfloat16)[name], before[name])
        # How far along the reference's movement: rounding adds noise across it, and takes nothing off.
        along = float((ours * theirs).sum() / theirs.square().sum())
        assert abs(along - 1) < 0.05, name


def test_the_norm_is_that_of_all_gradients() -> None:
    weights = parameters(torch.float32)
    optimizer = optimizer_of(weights)
    optimizer.begin(1, RATE)
    backward(weights, gradients(1))
    optimizer.step()
    expected = torch.cat([gradient.flatten() for gradient in gradients(1).values()]).norm()
    assert float(optimizer.norm()) == pytest.approx(float(expected), rel=1e-6)
    optimizer.begin(2, RATE)
    assert float(optimizer.norm()) == 0


def test_micro_batches_of_a_window_are_added_up() -> None:
    weights, at_once = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = optimizer_of(weights, window=2), optimizer_of(at_once)
    for step in range(1, 4):
        both = [gradients(step), gradients(step + 100)]
        optimizer.begin(step, RATE)
        for each in both:
            before = weights["large"].detach().clone()
            backward(weights, each)
            assert torch.equal(before, weights["large"])  # not before the window's end
        optimizer.step()
        other.begin(step, RATE)
        backward(at_once, {name: both[0][name] + both[1][name] for name in SHAPES})
        other.step()
        assert not any(gradient.any() for gradient in optimizer.gradients)
    assert all(torch.equal(weights[name], at_once[name]) for name in SHAPES)


def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone_and_no_other() -> None:
    weights, before = parameters(torch.float32), parameters(torch.float32)
    optimizer = optimizer_of(weights)
    moments = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    optimizer.begin(1, RATE)
    backward(weights, {**gradients(1), "large": torch.full(SHAPES["large"], math.nan)})
    optimizer.step()
    assert torch.equal(weights["large"], before["large"])
    assert not torch.equal(weights["small"], before["small"])
    after = optimizer.tensors()
    assert all(torch.equal(after[name], moments[name]) for name in moments if name.startswith("large."))
    assert math.isnan(float(optimizer.norm()))


def test_a_rehearsal_changes_nothing() -> None:
    weights, before = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer = optimizer_of(weights)
    moments = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    optimizer.begin(1, RATE)
    with optimizer.rehearsal():
        backward(weights, gradients(1))
    assert all(torch.equal(weights[name], before[name]) for name in SHAPES)
    assert all(torch.equal(tensor, moments[name]) for name, tensor in optimizer.tensors().items())
    optimizer.squares.zero_()  # as a captured call clears what has changed
    backward(weights, gradients(1))
    assert not any(torch.equal(weights[name], before[name]) for name in SHAPES)


def test_to_go_on_has_the_same_bits() -> None:
    whole = parameters(torch.bfloat16)
    train(optimizer_of(whole), whole, range(1, 7))
    weights = parameters(torch.bfloat16)
    first = optimizer_of(weights)
    train(first, weights, range(1, 4))
    weights = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    second = optimizer_of(weights)
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    second.load_state_dict(first.state_dict())
    train(second, weights, range(4, 7))
    assert all(torch.equal(weights[name], whole[name]) for name in SHAPES)


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_entry_is_found(signed: bool) -> None:
    table = Table.on(CPU, signed)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(1 << 18, generator=generator) * 10 ** (-9 * torch.rand(1 << 18, generator=generator))
    if signed:
        numbers *= torch.where(torch.rand(1 << 18, generator=generator) < 0.5, -1.0, 1.0)
    borders = table.borders[:-1]
    beside = [torch.nextafter(borders, torch.tensor(end)) for end in (-2.0, 2.0)]
    numbers = torch.cat([numbers, table.values, borders, *beside])
    found = table.nearest(numbers)
    assert torch.equal(found, torch.bucketize(numbers, borders).to(torch.uint8))
    assert torch.equal(table.values[table.nearest(table.values).int()], table.values)


def test_the_table_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_blockwise(values, blocksize=256)
    ours = Table.on(CPU, signed=True)
    scale = values.abs().amax(dim=1, keepdim=True)
    unpacked = ours.values[ours.nearest(values / scale).int()] * scale
    theirs = dequantize_blockwise(packed, state)
    # Theirs on a CPU may take the neighbour of a number in the middle.
    assert float((unpacked - theirs).abs().max()) < 0.02 * float(scale.max())
    assert float(((unpacked - values).norm() - (theirs - values).norm()).abs()) < 1e-3


@pytest.mark.parametrize("count", [1, 4095, 4096, 4099, 1 << 16])
def test_the_bytes_of_moments_are_counted(count: int) -> None:
    moments = new_moments(count, CPU)
    assert isinstance(moments, Moments) == (count < 4096)
    assert sum(tensor.nbytes for tensor in moments) == state_bytes(count)


def test_the_bytes_of_training_all_are_counted() -> None:
    shapes = {"a": torch.Size([100, 100]), "b": torch.Size([10]), "pos_embed.pos_embed": torch.Size([1, 9, 4])}
    moments = state_bytes(10_000) + state_bytes(10)
    update = update_bytes(CPU)
    assert whole_bytes(shapes, torch.bfloat16, 1, CPU) == moments + update
    assert whole_bytes(shapes, torch.bfloat16, 4, CPU) == moments + 2 * 10_010 + update


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_the_numbers_of_a_cpu(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled there: the same random bits, and the same weights but for float32's roundings."""
    pytest.importorskip("triton")
    ours = parameters(dtype)
    train(optimizer_of(ours), ours, range(1, 4))
    theirs = {name: torch.nn.Parameter(weight.detach().to(GPU)) for name, weight in parameters(dtype).items()}
    optimizer = optimizer_of(theirs)
    assert capsys.readouterr().out == ""  # no note that it is not compiled
    for step in range(1, 4):
        optimizer.begin(step, RATE)
        backward(theirs, {name: gradient.to(GPU) for name, gradient in gradients(step).items()})
        optimizer.step()
    for name, weight in theirs.items():
        different = (weight.detach().cpu() != ours[name].detach()).float().mean()
        assert float(different) < (0.02 if dtype == torch.bfloat16 else 1), name
        torch.testing.assert_close(weight.detach().cpu(), ours[name].detach(), rtol=1e-2, atol=1e-4)


def compute_with(weights: dict[str, torch.nn.Parameter]) -> Callable[..., torch.Tensor]:
    """A micro-step whose gradients are its inputs."""

    def compute(*wanted: torch.Tensor) -> torch.Tensor:
        terms = [(weight * each).sum() for weight, each in zip(weights.values(), wanted, strict=True)]
        loss = torch.stack(terms).sum()
        loss.backward()
        return loss.detach()

    return compute


def steps_of(
    device: torch.device, call_of: Callable[[AdamInBackward, Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]
) -> tuple[dict[str, torch.nn.Parameter], list[float]]:
    """The weights after five steps, each with its own rate, and the norms."""
    weights = {name: torch.nn.Parameter(each.detach().to(device)) for name, each in parameters(torch.bfloat16).items()}
    optimizer = optimizer_of(weights)
    call, norms = call_of(optimizer, compute_with(weights)), []
    for step in range(1, 6):
        optimizer.begin(step, RATE / step)
        call(*(gradient.to(device, torch.bfloat16) for gradient in gradients(step).values()))
        optimizer.step()
        norms.append(float(optimizer.norm()))
        if step == 3 and isinstance(call, CapturedCall):
            call.release()  # as before pictures are drawn
    return weights, norms


def captured(optimizer: AdamInBackward, compute: Callable[..., torch.Tensor]) -> CapturedCall:
    call = CapturedCall(compute, optimizer.squares.device, optimizer.gradients, asked=True, exact=True)
    call.rehearsal = optimizer.rehearsal
    return call


def require_same(left: tuple[dict[str, Any], list[float]], right: tuple[dict[str, Any], list[float]]) -> None:
    assert left[1] == right[1]
    assert all(torch.equal(left[0][name], right[0][name]) for name in SHAPES)


def test_what_is_tried_out_before_a_replay_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a graph, which computes when it is captured too."""
    plain = steps_of(CPU, lambda _, compute: compute)
    fakes = list[FakeCuda]()

    def faked(optimizer: AdamInBackward, compute: Callable[..., torch.Tensor]) -> CapturedCall:
        fakes.append(FakeCuda(monkeypatch, compute, optimizer.gradients))
        return captured(optimizer, fakes[0])

    require_same(steps_of(CPU, faked), plain)
    kinds = [event.split()[0] for event in fakes[0].events]
    assert kinds == ["compute", "freed", "capture", "replay", *["replay"] * 3, "freed", "capture", "replay", "replay"]


@needs_gpu
def test_a_captured_step_is_the_plain_one() -> None:
    """Each replay has its own rate, step and random bits."""
    require_same(steps_of(GPU, captured), steps_of(GPU, lambda _, compute: compute))


def test_nothing_stays_in_memory_of_a_model_that_is_gone() -> None:
    weights = parameters(torch.bfloat16)
    optimizer = optimizer_of(weights)
    train(optimizer, weights, range(1, 3))
    seen = [weakref.ref(weights["large"]), weakref.ref(optimizer.tensors()["large.first"]), weakref.ref(optimizer)]
    del weights, optimizer
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]
