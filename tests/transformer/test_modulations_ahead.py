"""Modulations that are computed one micro-step ahead: the same numbers, and forward copies none of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from typing import Any

import sd3_lora.transformer.streaming
from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.transformer.lora import attach_lora
from sd3_lora.transformer.modulations_ahead import Modulating, ModulationsAhead
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import StreamedBlocks, pieces_of, stream_transformer
from sd3_lora.transformer.velocity import VelocityModel

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_transformer import CPU, GPU, inputs, late_copies, make_transformer, needs_gpu
from test_streaming import BLOCKS, draw, make_nf4, stream_poisoned, watched


def modulating_of(words: dict[str, torch.Tensor], step: int) -> Modulating:
    """A timestep of its own for each step."""
    words["timestep"] = words["timestep"] + step
    return words["timestep"], words["pooled_projections"]


def train_ahead(
    transformer: SD3Transformer2DModel,
    ahead: ModulationsAhead | None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    steps: int = 5,
    unknown: Collection[int] = (),
    wrap: Callable[..., Any] = lambda compute: compute,
) -> list[torch.Tensor]:
    """Losses and gradients of some steps; what comes after the `unknown` ones is not known in time."""
    batches = [inputs(0, device, dtype) for _ in range(steps)]
    for step, words in enumerate(batches):
        words["pooled_projections"] = inputs(step, device, dtype)["pooled_projections"]
    modulating = [modulating_of(words, step) for step, words in enumerate(batches)]
    precision = partial(VelocityModel(transformer, dtype).precision, device)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def compute(*tensors: torch.Tensor) -> torch.Tensor:
        words = dict(zip(batches[0], tensors, strict=True))
        with ahead.active() if ahead else nullcontext():
            with precision():
                velocity = transformer(**words, return_dict=False)[0]
            loss = (velocity.float() - words["hidden_states"].float()).square().mean()
            loss.backward()
        return loss.detach()

    step_of, found = wrap(compute), []
    for step, words in enumerate(batches):
        if ahead:
            with precision():
                is_known = step + 1 < steps and step not in unknown
                ahead.advance(modulating[step], modulating[step + 1] if is_known else None)
        found.append(step_of(*words.values()).cpu())
        for parameter in parameters:
            found.append(parameter.grad.cpu().clone())
            parameter.data -= 0.1 * parameter.grad
            parameter.grad.zero_()
    return found


def is_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("buffers", [2, 3, 6, 40])
@pytest.mark.parametrize("unknown", [(), (0, 2), range(5)], ids=["all known", "some known", "none known"])
def test_numbers_are_those_of_resident_blocks(buffers: int, unknown: Collection[int]) -> None:
    expected = train_ahead(make_transformer(), None)
    for count in (1, 3, BLOCKS - 1, BLOCKS):
        transformer = make_transformer()
        ahead = ModulationsAhead(transformer, stream_poisoned(transformer, buffers=buffers), range(count))
        recompute_blocks(transformer, range(count), offload_inputs=True)
        with late_copies():
            assert is_equal(train_ahead(transformer, ahead, unknown=unknown), expected)


@pytest.mark.parametrize("make", [make_transformer, partial(make_nf4, CPU)], ids=["16 bits", "4 bits"])
def test_in_lower_precisions(make: Callable[..., SD3Transformer2DModel]) -> None:
    expected = train_ahead(make(dtype=torch.bfloat16), None, dtype=torch.bfloat16)
    transformer = make(dtype=torch.bfloat16)
    ahead = ModulationsAhead(transformer, stream_poisoned(transformer), range(BLOCKS))
    recompute_blocks(transformer, range(BLOCKS))
    with late_copies():
        assert is_equal(train_ahead(transformer, ahead, dtype=torch.bfloat16), expected)


def test_a_modulation_may_have_a_lora() -> None:
    def make() -> SD3Transformer2DModel:
        transformer = SD3Transformer2DModel.from_config(make_transformer().config)
        torch.manual_seed(5)
        for parameter in transformer.parameters():
            parameter.data = torch.randn(parameter.shape) / 8
        targets = [f"transformer_blocks.{index}.{name}" for index in (0, 3) for name in ("norm1.linear", "attn.to_q")]
        attach_lora(transformer, targets, 2, 2.0, 0.0, seed=0)
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape)
        return transformer.train()

    expected, transformer = train_ahead(make(), None), make()
    ahead = ModulationsAhead(transformer, stream_poisoned(transformer), range(BLOCKS))
    recompute_blocks(transformer, range(BLOCKS))
    with late_copies():
        assert is_equal(train_ahead(transformer, ahead), expected)


def test_forward_asks_for_none_and_backward_for_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step all of them are asked for beforehand; and where it was not said what comes."""
    transformer, events = make_transformer(layers=3), watched(monkeypatch)
    pieces = pieces_of(transformer.transformer_blocks)
    modulations = [i for i, p in enumerate(pieces) if p.names[0].split(".")[2].startswith("norm")]
    first, last = modulations[:4], modulations[4:]
    rest = [index for index in range(len(pieces)) if index not in first]
    ahead = ModulationsAhead(transformer, stream_transformer(transformer, CPU), range(2))
    recompute_blocks(transformer, range(2))
    asked: list[list[int]] = []
    copies: list[int] = []

    def wrap(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def step(*tensors: torch.Tensor) -> torch.Tensor:
            asked.append(visits(events))
            events.clear()
            loss = compute(*tensors)
            asked.append(visits(events))
            copies.append(sum(event.startswith("copy ") for event in events))
            events.clear()
            return loss

        return step

    train_ahead(transformer, ahead, steps=4, unknown=[1], wrap=wrap)
    before, within = asked[::2], asked[1::2]
    assert before == [first, [], first, []]
    assert copies == [
        27,
        26,
        27,
        26,
    ]  # no vain prefetch; one piece is there already if nothing came between
    for found in within:
        assert found[: len(rest)] == rest
        assert [index for index in found[len(rest) :] if index in modulations] == [*first[2:], *first[:2]]
    assert set(last) <= set(rest)


def visits(events: list[str]) -> list[int]:
    return [int(event.removeprefix("visit ")) for event in events if event.startswith("visit ")]


def test_a_micro_step_that_is_repeated_gives_the_same() -> None:
    """As recording does."""

    def wrap(compute: Callable[..., torch.Tensor], parameters: list[torch.nn.Parameter]) -> Callable[..., torch.Tensor]:
        def step(*tensors: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                compute(*tensors)
                for parameter in parameters:
                    parameter.grad.zero_()
            return compute(*tensors)

        return step

    expected, transformer = train_ahead(make_transformer(), None), make_transformer()
    ahead = ModulationsAhead(transformer, stream_poisoned(transformer), range(BLOCKS))
    recompute_blocks(transformer, range(BLOCKS))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    with late_copies():
        assert is_equal(train_ahead(transformer, ahead, wrap=partial(wrap, parameters=parameters)), expected)


def test_a_batch_that_comes_again_without_a_hint_is_not_taken_for_what_was_to_come() -> None:
    transformer = make_transformer()
    ahead = ModulationsAhead(transformer, stream_transformer(transformer, CPU), range(BLOCKS))
    first, second = ((torch.tensor([900.0, 100.0 + 50 * step]), torch.full((2, 8), 1.0 + step)) for step in range(2))
    found = []
    for now, coming in ((first, None), (first, None), (second, None), (first, None)):
        ahead.advance(now, coming)
        found.append([given.clone() for given in ahead._given])
    assert is_equal(found[1], found[0])
    assert is_equal(found[3], found[0])
    assert not any(map(torch.equal, found[2], found[0]))


def test_what_replays_left_in_the_buffers_is_not_taken_for_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay says nothing of what it copies; and so few pieces would all still be there."""
    transformer, plain = make_transformer(), make_transformer()
    streamed = stream_transformer(transformer, CPU, None, 6, [0])
    ahead = ModulationsAhead(transformer, streamed, [0])
    recompute_blocks(transformer, range(BLOCKS))
    words, found = inputs(0, CPU), []
    for _ in range(3):
        ahead.advance((words["timestep"].clone(), words["pooled_projections"]), None)
        found.append([given.clone() for given in ahead._given])
        if len(found) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(sd3_lora.transformer.streaming, "_is_capturing", lambda _: True)
                transformer(**words)
        for slot in streamed._slots:
            slot.buffer.fill_(255)
    assert is_equal(found[1], found[0])
    assert is_equal(found[2], found[0])
    assert is_equal(draw(transformer), draw(plain))


def test_outside_of_a_step_the_layers_compute_what_they_always_did() -> None:
    plain, transformer = make_transformer(), make_transformer()
    ahead = ModulationsAhead(transformer, stream_poisoned(transformer), range(BLOCKS))
    recompute_blocks(transformer, range(BLOCKS))
    with late_copies():
        for _ in range(2):
            assert is_equal(draw(transformer), draw(plain))
            assert is_equal(train_ahead(transformer, ahead, steps=2), train_ahead(plain, None, steps=2))


def test_nothing_holds_itself() -> None:
    transformer = make_transformer()
    streamed: StreamedBlocks | None = stream_transformer(transformer, CPU)
    ahead: ModulationsAhead | None = ModulationsAhead(transformer, streamed, range(BLOCKS))
    recompute_blocks(transformer, range(BLOCKS))
    train_ahead(transformer, ahead, steps=2)
    gc.collect()
    gc.disable()
    try:
        held = [weakref.ref(whole) for whole in (ahead, streamed, *transformer.modules())]
        del ahead, streamed, transformer
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()


@needs_gpu
def test_beside_a_step_it_leaves_no_workspace_of_cublas() -> None:
    transformer = make_transformer(dtype=torch.float16)
    ahead = ModulationsAhead(transformer, stream_transformer(transformer, GPU), range(BLOCKS))
    drop_workspaces(GPU)
    free_memory(GPU)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(2):
        now, coming = ((torch.zeros(2, device=GPU), torch.zeros(2, 8, device=GPU).half()) for _ in range(2))
        ahead.advance(now, coming)
        ahead.advance(coming, None)
    assert torch.cuda.memory_allocated() - before[0] < 1024**2
    assert torch.cuda.memory_reserved() - before[1] <= 4 * 1024**2


@needs_gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("buffers", [2, 6])
@pytest.mark.parametrize("make", [make_transformer, make_nf4])
def test_on_a_gpu(make: Callable[..., SD3Transformer2DModel], buffers: int, captured: bool) -> None:
    words: dict[str, Any] = {"dtype": torch.float16} | ({"device": GPU} if make is make_nf4 else {})
    expected = train_ahead(make(**words).to(GPU), None, GPU, torch.float16)
    for count, unknown in ((3, ()), (BLOCKS - 1, (1, 2)), (BLOCKS, range(5))):
        transformer = make(**words)
        ahead = ModulationsAhead(transformer, stream_transformer(transformer, GPU, None, buffers), range(count))
        recompute_blocks(transformer, range(count), offload_inputs=count == BLOCKS)
        gradients = [p for p in transformer.parameters() if p.requires_grad]

        def wrap(compute: Callable[..., torch.Tensor], gradients: Any = gradients) -> Callable[..., torch.Tensor]:
            if not captured:
                return compute
            return CapturedCall(compute, GPU, [parameter.grad for parameter in gradients], asked=True)

        found = train_ahead(transformer, ahead, GPU, torch.float16, unknown=unknown, wrap=wrap)
        assert is_equal(found, expected)
