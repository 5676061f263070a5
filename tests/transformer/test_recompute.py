"""Recomputed and offloaded activations: the same numbers bit for bit, less memory, the blocks that were asked for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sd3_lora.transformer.recompute
from sd3_lora.gpu.copy_stream import CopyStream
from sd3_lora.transformer.recompute import recompute_blocks

import pytest
import torch
from small_transformer import CPU, GPU, inputs, late_copies, make_transformer, needs_gpu, train_steps


@contextmanager
def count_visits(transformer: torch.nn.Module) -> Iterator[list[int]]:
    """The indices of the blocks, as they begin to compute."""
    visits: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: visits.append(index))
        for index, block in enumerate(transformer.transformer_blocks)
    ]
    yield visits
    for hook in hooks:
        hook.remove()


# Which, and to the bit


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_losses_and_gradients_are_those_of_kept_activations(count: int, offload: bool, dropout: float) -> None:
    plain = train_steps(make_transformer(dropout=dropout))
    transformer = make_transformer(dropout=dropout)
    recompute_blocks(transformer, range(count), offload)
    assert train_steps(transformer).is_equal(plain)


def test_the_comparison_sees_a_bit_and_dropout() -> None:
    """Else the tests above could pass for nothing."""
    trained = [train_steps(make_transformer(dropout=dropout)) for dropout in (0.0, 0.0, 0.3)]
    assert trained[0].is_equal(trained[1])
    assert not trained[0].is_equal(trained[2])
    gradient = next(iter(trained[1].gradients[2].values())).view(-1)
    gradient[0] = torch.nextafter(gradient[0], torch.tensor(9.0))
    assert not trained[0].is_equal(trained[1])


@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_the_first_blocks_are_recomputed_last_to_first(count: int, offload: bool) -> None:
    transformer = make_transformer()
    recompute_blocks(transformer, range(count), offload)
    with count_visits(transformer) as visits:
        train_steps(transformer, steps=2)
    assert visits == 2 * [0, 1, 2, 3, 4, 5, *reversed(range(count))]


def test_nothing_is_recomputed_without_gradients_or_after_count_zero() -> None:
    transformer = make_transformer()
    recompute_blocks(transformer, range(6), True)
    with count_visits(transformer) as visits, torch.no_grad():
        transformer(**inputs(0, CPU))
    assert visits == [0, 1, 2, 3, 4, 5]
    recompute_blocks(transformer, range(0))
    with count_visits(transformer) as visits:
        train_steps(transformer, steps=1)
    assert visits == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("indices", [(5,), (1, 3), (4, 0, 2)], ids=str)
def test_any_blocks_may_be_recomputed(indices: tuple[int, ...]) -> None:
    """The plan takes the first ones; a placement may name others."""
    plain, transformer = train_steps(make_transformer()), make_transformer()
    recompute_blocks(transformer, indices, True)
    with count_visits(transformer) as visits:
        assert train_steps(transformer, steps=3).is_equal(plain)
    assert visits == 3 * [0, 1, 2, 3, 4, 5, *sorted(indices, reverse=True)]


def test_a_block_that_the_transformer_does_not_have() -> None:
    """Flags are checked before, by `AskedPlacement.check`."""
    with pytest.raises(IndexError, match="6 is out of range"):
        recompute_blocks(make_transformer(), range(7))


# What a failure leaves


def leaky_checkpoint(function: Any, *inputs: Any, use_reentrant: bool, preserve_rng_state: bool) -> Any:
    """As torch 2.11 has it: nothing takes the hooks back where the function fails."""
    assert not use_reentrant
    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator(
        function, preserve_rng_state, torch.utils.checkpoint.noop_context_fn, "default", False, True, *inputs
    )
    next(generator)
    result = function(*inputs)
    next(generator, None)
    return result


@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("leaky", [False, True], ids=["this torch", "torch 2.11"])
def test_a_forward_that_fails_leaves_no_hooks(leaky: bool, offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_steps(make_transformer())
    if leaky:
        monkeypatch.setattr(sd3_lora.transformer.recompute, "checkpoint", leaky_checkpoint)
    failing = make_transformer()
    recompute_blocks(failing, range(6), offload)
    failing.transformer_blocks[2].attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        failing(**inputs(0, CPU))
    transformer = make_transformer()
    recompute_blocks(transformer, range(6), offload)
    with count_visits(failing) as visits:
        assert train_steps(transformer).is_equal(plain)
    assert not visits
    assert error.value.__traceback__  # whose frames have lived until here


# Memory


def peak_of_kept(count: int, last: bool) -> int:
    """The most bytes of activations that a step keeps at once, counted by the storages that are alive."""
    transformer = make_transformer(layers=6, dual=())
    recompute_blocks(transformer, range(6 - count, 6) if last else range(count))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_steps(transformer, steps=1)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_first_blocks_lower_the_peak_more_than_the_last() -> None:
    assert peak_of_kept(3, last=False) < 0.9 * peak_of_kept(3, last=True)


def test_one_block_less_has_the_peak_of_all() -> None:
    everything, but_one, none = (peak_of_kept(count, last=False) for count in (6, 5, 0))
    assert but_one <= everything < 0.5 * none


# Moving inputs


class Counted:
    """Counts the copies that are started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.started = 0
        start = CopyStream.start

        def count(stream: CopyStream, copy: Any) -> Any:
            self.started += 1
            return start(stream, copy)

        monkeypatch.setattr(CopyStream, "start", count)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_each_block_but_the_last_sends_two_tensors_and_fetches_once(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """hidden_states and encoder_hidden_states go one by one and come back together; temb stays."""
    counted = Counted(monkeypatch)
    transformer = make_transformer()
    recompute_blocks(transformer, range(count), offload_inputs=True)
    train_steps(transformer, steps=1)
    assert counted.started == (count - 1) * (2 + 1)


def test_the_block_before_is_fetched_ahead() -> None:
    """When a block is recomputed, one copy is under way that nothing has waited for yet.

    In whatever order autograd asks for the inputs: torch up to 2.11 saves an empty tensor of its own before them.
    """
    transformer = make_transformer()
    recompute_blocks(transformer, range(6), offload_inputs=True)
    under_way = []
    with late_copies() as outstanding:
        backward = False
        for block in transformer.transformer_blocks:
            block.register_forward_pre_hook(lambda *_: under_way.append(len(outstanding)) if backward else None)
        loss = transformer(**inputs(0, CPU)).sample.square().mean()
        assert not outstanding  # all that was sent has been waited for, so that its memory is free
        backward = True
        loss.backward()
    assert under_way == [1, 1, 1, 1, 1, 0]


def test_copies_may_be_as_late_as_their_waits() -> None:
    plain = train_steps(make_transformer(dropout=0.3))
    transformer = make_transformer(dropout=0.3)
    recompute_blocks(transformer, range(6), offload_inputs=True)
    with late_copies():
        assert train_steps(transformer).is_equal(plain)


def test_a_sent_input_is_not_kept_on_the_device() -> None:
    transformer = make_transformer()
    recompute_blocks(transformer, range(6), offload_inputs=True)
    alive = []
    for block in transformer.transformer_blocks:

        def watch(_: Any, words: tuple[Any, ...]) -> None:
            if not recomputing:
                alive.append(weakref.ref(words[0].untyped_storage()))

        block.register_forward_pre_hook(watch)
    recomputing = False
    sample = transformer(**inputs(0, CPU)).sample
    recomputing = True
    gc.collect()
    assert [reference() is not None for reference in alive] == [False] * 5 + [True]
    sample.square().mean().backward()


def test_a_fetched_input_is_freed_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the graph stays."""
    fetched: list[weakref.ref[torch.Tensor]] = []
    bring = sd3_lora.transformer.recompute._BlockInputs._bring

    def watch(self: Any, missing: list[int]) -> None:
        bring(self, missing)
        fetched.extend(weakref.ref(tensor.untyped_storage()) for tensor in self._fetched.values())
        alive.append(sum(reference() is not None for reference in fetched))

    alive: list[int] = []
    monkeypatch.setattr(sd3_lora.transformer.recompute._BlockInputs, "_bring", watch)
    transformer = make_transformer()
    recompute_blocks(transformer, range(6), offload_inputs=True)
    loss = transformer(**inputs(0, CPU)).sample.square().mean()
    loss.backward(retain_graph=True)
    assert alive == [2, 4, 4, 4, 4]  # its own and those of the block before
    gc.collect()
    assert not any(reference() is not None for reference in fetched)


def test_a_graphs_host_memory_is_used_again_when_the_graph_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = sd3_lora.transformer.recompute._InputOffload.send

    def watch(*words: Any) -> torch.Tensor:
        host = send(*words)
        sent.append(host.data_ptr())
        return host

    monkeypatch.setattr(sd3_lora.transformer.recompute._InputOffload, "send", watch)
    transformer = make_transformer()
    recompute_blocks(transformer, range(6), offload_inputs=True)
    first, second = (transformer(**inputs(0, CPU)).sample for _ in range(2))
    assert len(sent) == len(set(sent)) == 20
    del second
    transformer(**inputs(0, CPU))
    assert set(sent[20:]) == set(sent[10:20])
    first.square().mean().backward()
    del first
    transformer(**inputs(0, CPU))
    assert set(sent[30:]) <= set(sent[:20])


def test_two_forwards_before_one_backward_and_one_that_is_given_up() -> None:
    def gradients(recomputed: bool) -> list[torch.Tensor]:
        transformer = make_transformer()
        if recomputed:
            recompute_blocks(transformer, range(5), offload_inputs=True)
            transformer(**inputs(7, CPU))
        samples = [transformer(**inputs(step, CPU)).sample for step in range(2)]
        (samples[0].square().mean() + samples[1].square().mean()).backward()
        return [p.grad for p in transformer.parameters() if p.requires_grad]

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_backward_twice() -> None:
    def gradients(recomputed: bool) -> list[torch.Tensor]:
        transformer = make_transformer()
        if recomputed:
            recompute_blocks(transformer, range(6), offload_inputs=True)
        loss = transformer(**inputs(0, CPU)).sample.square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in transformer.parameters() if p.requires_grad]

    assert all(map(torch.equal, gradients(True), gradients(False)))


# On a GPU


@needs_gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("count", [4, 6])
def test_a_gpu_computes_the_same(count: int, offload: bool) -> None:
    plain = train_steps(make_transformer(dropout=0.3, dtype=torch.float16).to(GPU), GPU, dtype=torch.float16)
    transformer = make_transformer(dropout=0.3, dtype=torch.float16).to(GPU)
    recompute_blocks(transformer, range(count), offload)
    assert train_steps(transformer, GPU, dtype=torch.float16).is_equal(plain)


@needs_gpu
def test_offloaded_inputs_are_off_the_gpu() -> None:
    """64 pictures of 64 tokens, 24 blocks: their inputs are most of what a forward leaves behind."""
    words = {
        "hidden_states": torch.randn(64, 4, 16, 16, device=GPU),
        "timestep": torch.ones(64, device=GPU),
        "encoder_hidden_states": torch.randn(64, 5, 32, device=GPU),
        "pooled_projections": torch.randn(64, 8, device=GPU),
    }
    left = []
    for offload in (False, True):
        transformer = make_transformer(layers=24, dual=()).to(GPU)
        recompute_blocks(transformer, range(24), offload)
        for _ in range(2):  # the first one brings cuBLAS its workspaces, and the LoRA its gradients
            before = torch.cuda.memory_allocated()
            sample = transformer(**words).sample
            after = torch.cuda.memory_allocated()
            sample.square().mean().backward()
            del sample
        left.append(after - before)
    assert left[0] > 24 * 64 * 64 * 32 * 4
    assert left[1] < 0.4 * left[0]
