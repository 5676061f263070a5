"""Streamed pieces: the numbers of resident ones bit for bit, from two buffers, with as few copies as there can be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, partialmethod
from itertools import product
from typing import Any

import sd3_lora.transformer.streaming
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.gpu.packed_tensors import layout
from sd3_lora.gpu.pinned_memory import pinned_bytes
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import (
    PinnedPieces,
    StreamedBlocks,
    _Slot,
    pieces_of,
    stream_transformer,
)

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_transformer import CPU, WIDTH, inputs, late_copies, make_transformer, train_steps

BLOCKS, PIECES = 6, 31


def draw(transformer: SD3Transformer2DModel, passes: int = 3, device: torch.device = CPU) -> list[torch.Tensor]:
    """Forwards without a gradient, as in inference."""
    with torch.no_grad():
        return [transformer(**inputs(step, device)).sample.cpu() for step in range(passes)]


def step_back(transformer: SD3Transformer2DModel, loss: torch.Tensor) -> list[torch.Tensor]:
    """The LoRA's gradients."""
    loss.backward()
    gradients = [p.grad for p in transformer.parameters() if p.grad is not None]
    transformer.zero_grad()
    return gradients


class PoisonedBlocks(StreamedBlocks):
    """A buffer is NaN from the moment that its piece may be overwritten; and the copy is late (`late_copies`)."""

    def _bring(self, index: int, wanted: Sequence[int]) -> _Slot:
        before = self.copies
        slot = super()._bring(index, wanted)
        if self.copies > before:
            slot.buffer.fill_(255)
        return slot


def stream_poisoned(transformer: SD3Transformer2DModel, source: Any = None, buffers: int = 2) -> StreamedBlocks:
    """`stream_transformer`; who would compute from the host's memory finds nothing there, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd3_lora.transformer.streaming, "StreamedBlocks", PoisonedBlocks)
        streamed = stream_transformer(transformer, CPU, source, buffers)
    for piece in pieces_of(transformer.transformer_blocks):
        for layer in piece.layers:
            layer.weight.data = layer.weight.data[:0]
    return streamed


# To the bit


@pytest.mark.parametrize("layers", [1, 2, 5, 6])
@pytest.mark.parametrize(("late", "buffers"), [(False, 2), (True, 2), (True, 3), (True, 6), (True, 40)])
def test_numbers_are_those_of_resident_blocks_however_early_or_late_the_copies(
    layers: int, late: bool, buffers: int
) -> None:
    stream: Callable[..., StreamedBlocks] = stream_poisoned if late else partial(stream_transformer, device=CPU)
    plain = make_transformer(layers, 0.3)
    trained, drawn = train_steps(plain), draw(plain)
    for count, offload in product(sorted({0, 1, layers - 1, layers}), (False, True)):
        transformer = make_transformer(layers, 0.3)
        stream(transformer, source=None, buffers=buffers)
        recompute_blocks(transformer, range(count), offload)
        with late_copies() if late else nullcontext():
            assert train_steps(transformer).is_equal(trained), (count, offload)
            assert all(map(torch.equal, draw(transformer), drawn))


@pytest.mark.parametrize("count", [0, 3, BLOCKS])
def test_what_autograd_saved_is_right_whatever_ran_since(count: int) -> None:
    """Backwards in another order than their forwards, with a picture between, and one of them twice."""

    def gradients(transformer: SD3Transformer2DModel) -> list[torch.Tensor]:
        first, second = (transformer(**inputs(step, CPU)).sample.square().mean() for step in range(2))
        drawn = draw(transformer)
        found = [gradient for loss in (first, second) for gradient in step_back(transformer, loss)]
        third, fourth = (transformer(**inputs(step, CPU)).sample.square().mean() for step in range(2))
        third.backward(retain_graph=True)
        return [*drawn, *found, *step_back(transformer, fourth), *step_back(transformer, third)]

    plain, transformer = make_transformer(), make_transformer()
    recompute_blocks(plain, range(count))  # whose backward adds up in the same order
    recompute_blocks(transformer, range(count))
    stream_poisoned(transformer)
    expected = gradients(plain)
    with late_copies():
        found = gradients(transformer)
    assert len(found) == len(expected) > 3
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("count", [0, 3, BLOCKS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixed_dtypes_under_autocast(dtype: torch.dtype, count: int) -> None:
    """One layer's matrix is converted as it multiplies, or all but one's are; autograd then saves the converted one."""

    def make() -> SD3Transformer2DModel:
        transformer = make_transformer(dtype=dtype)
        for block in transformer.transformer_blocks:
            block.ff.net[2].to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
        return transformer

    plain = train_steps(make(), dtype=torch.bfloat16)
    transformer = make()
    stream_poisoned(transformer)
    recompute_blocks(transformer, range(count))
    with late_copies():
        assert train_steps(transformer, dtype=torch.bfloat16).is_equal(plain)


def make_nf4(device: torch.device, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Half of the feed-forward's weights are quantized, on `device`; the rest is on the host."""
    from bitsandbytes.nn import Linear4bit

    transformer = make_transformer(dtype=dtype)
    for block in transformer.transformer_blocks:
        for feed_forward in filter(None, (block.ff, block.ff_context)):
            linear = feed_forward.net[2]
            packed = Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=dtype)
            packed.load_state_dict(linear.state_dict())
            feed_forward.net[2] = packed.requires_grad_(False).to(device)
    return transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 3, 5, 6])
def test_nf4_weights_are_streamed_too(count: int, dtype: torch.dtype) -> None:
    plain = train_steps(make_nf4(CPU, dtype), dtype=dtype)
    transformer = make_nf4(CPU, dtype)
    assert transformer.transformer_blocks[0].ff.net[2].weight.dtype == torch.uint8
    stream_poisoned(transformer)
    recompute_blocks(transformer, range(count))
    with late_copies():
        assert train_steps(transformer, dtype=dtype).is_equal(plain)


# Pieces


def test_every_matrix_of_the_blocks_is_in_one_piece_under_its_name_in_the_files() -> None:
    transformer = make_transformer()
    shapes = {n: t.shape for n, t in SD3Transformer2DModel.from_config(transformer.config).state_dict().items()}
    pieces = pieces_of(transformer.transformer_blocks)
    names = [name for piece in pieces for name in piece.names]
    assert names == [n for n, shape in shapes.items() if n.startswith("transformer_blocks.") and len(shape) == 2]
    parts = [{tuple(name.split(".")[1:3]) for name in piece.names} for piece in pieces]
    assert [len(part) for part in parts] == [1] * PIECES
    assert len(set().union(*parts)) == PIECES
    frozen = {n.replace(".base_layer.", "."): p for n, p in transformer.named_parameters() if not p.requires_grad}
    for piece in pieces:
        assert [id(layer.weight) for layer in piece.layers] == [id(frozen[name]) for name in piece.names]
        assert [weight.data_ptr() for weight in piece.weights] == [frozen[name].data_ptr() for name in piece.names]


@pytest.mark.parametrize(("dual", "per_block"), [((), [1, 1, 6, 2, 1, 1, 1, 1]), ((0, 1), [1, 1, 8, 4, 2, 2])])
def test_no_piece_is_larger_than_the_largest_matrix(dual: tuple[int, ...], per_block: list[int]) -> None:
    """A modulation's: 6 C^2 weights, or 9 with dual attention; attention and feed-forward networks have 8."""
    transformer = make_transformer(dual=dual)
    pieces = pieces_of(transformer.transformer_blocks)
    assert [len(piece.layers) for piece in pieces[: len(per_block)]] == per_block
    sizes = [sum(weight.numel() for weight in piece.weights) for piece in pieces]
    assert max(sizes) == (9 if dual else 6) * WIDTH**2
    assert sum(sizes) == sum(weight.numel() for piece in pieces for weight in piece.weights)


def test_some_blocks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their matrices are sent to the device like all the rest, and are the same numbers there."""
    plain, streamed_blocks = train_steps(make_transformer()), (0, 2, 3)
    transformer = make_transformer()
    own = pieces_of(transformer.transformer_blocks, streamed_blocks)
    assert {name.split(".")[1] for piece in own for name in piece.names} == {"0", "2", "3"}
    whole = {piece.names: piece.layers for piece in pieces_of(transformer.transformer_blocks)}
    assert all(whole[piece.names] == piece.layers for piece in own)
    staying = [w.data_ptr() for piece in pieces_of(transformer.transformer_blocks, (1, 4, 5)) for w in piece.weights]
    sent, to = [], torch.Tensor.to
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *words: sent.append(self.data_ptr()) or to(self, *words))
        streamed = stream_transformer(transformer, CPU, buffers=3, streamed_blocks=streamed_blocks)
    assert set(staying) < set(sent)
    assert streamed.host_bytes == pinned_bytes([layout(piece.weights)[-1] for piece in own])
    recompute_blocks(transformer, range(4))
    assert train_steps(transformer).is_equal(plain)
    assert streamed.copies > len(own)


# Copies

# Of 11 pieces, where the last block has the last five. The first piece that a LoRA is before, or in, is the first
# attention.
TWO_BLOCKS = list(range(11))
PASSES = [
    (1, 0, [0, 1, 2, 3, 4, 2], [0, 7, 14, 20, 26]),
    (1, 1, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 2], [0, 11, 23, 34, 45]),
    (2, 0, [*TWO_BLOCKS, 9, 8, 5, 4, 2], [0, 17, 33, 48, 63]),
    (2, 2, [*TWO_BLOCKS, *TWO_BLOCKS[6:], 9, 8, *TWO_BLOCKS[:6], 4, 2], [0, 25, 50, 74, 98]),
]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order: `visit 3` as piece 3 is asked for, and what that leads to: `copy 4`, `prefetch 5`."""
    events: list[str] = []
    for owner, method, name in (
        (StreamedBlocks, "_stream", "visit"),
        (PinnedPieces, "fill", "copy"),
        (PinnedPieces, "prefetch", "prefetch"),
    ):

        def watch(whole: Callable[..., Any], name: str, self: Any, index: int, *words: Any) -> Any:
            events.append(f"{name} {index}")
            return whole(self, index, *words)

        monkeypatch.setattr(owner, method, partialmethod(partial(watch, getattr(owner, method), name)))
    return events


def prefetched(asked: list[int], buffers: int = 2) -> list[str]:
    """The events of a pass that asks as the one before did: nothing waits for a copy that begins at its own visit."""
    held: list[int | None] = [None] * buffers  # the one visited longest ago first
    for _ in range(3):
        events = []
        for at, index in enumerate(asked):
            *coming, later = (asked[(at + ahead) % len(asked)] for ahead in range(1, buffers + 1))
            events.append(f"visit {index}")
            for piece in (index, *coming):
                if piece not in held:
                    held[next(place for place in range(buffers) if held[place] not in (index, *coming))] = piece
                    events.append(f"copy {piece}")
                if piece == index:
                    held = [*(other for other in held if other != index), index]
            if later not in held:
                events.append(f"prefetch {later}")
    return events


def test_the_first_forward_is_prefetched_and_the_first_backward_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    events = watched(monkeypatch)
    transformer = make_transformer(layers=1)
    stream_transformer(transformer, CPU)
    train_steps(transformer, steps=3, between=lambda _: events.append("|"))
    forward = "copy 1, prefetch 2, visit 1, copy 2, prefetch 3, visit 2, copy 3, prefetch 4, visit 3, copy 4"
    first, second, third = ", ".join(events).removeprefix("|, ").split(", |, ")
    assert first == f"visit 0, copy 0, {forward}, prefetch 0, visit 4, copy 0, prefetch 1, visit 2, copy 2"
    again = f"{forward}, prefetch 2, visit 4, copy 2, prefetch 0, visit 2, copy 0, prefetch 1"
    assert second == f"visit 0, copy 0, {again}"
    assert third == f"visit 0, {again}"


@pytest.mark.parametrize("buffers", [2, 3, 4])
@pytest.mark.parametrize(("layers", "count", "asked", "copies"), PASSES)
def test_each_piece_is_copied_while_those_before_compute_and_prefetched_one_earlier(
    layers: int, count: int, asked: list[int], copies: list[int], buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the second step; and what a buffer holds is not copied."""
    events, found = watched(monkeypatch), []
    transformer = make_transformer(layers)
    streamed = stream_transformer(transformer, CPU, None, buffers)
    recompute_blocks(transformer, range(count))
    train_steps(transformer, steps=4, between=lambda _: found.append((streamed.copies, len(events))))
    if buffers == 2:
        assert [*(copied for copied, _ in found), streamed.copies] == copies
    assert events[found[2][1] :] == 2 * prefetched(asked, buffers)


def test_six_buffers_hold_a_block_so_that_backward_copies_nothing_again() -> None:
    """Forward, and recomputed; and each end's pieces are there when the other pass begins."""
    transformer = make_transformer()
    streamed = stream_transformer(transformer, CPU, None, 6)
    recompute_blocks(transformer, range(BLOCKS))
    train_steps(transformer, steps=2)
    before = streamed.copies
    train_steps(transformer, steps=1)
    last_blocks, first_blocks = 5, 5
    assert streamed.copies - before == 2 * PIECES - last_blocks - first_blocks


@pytest.mark.parametrize("layers", [1, 6])
def test_drawing_is_prefetched_from_its_first_pass_on(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is copied once a pass; and already the first of the next one."""
    events = watched(monkeypatch)
    transformer = make_transformer(layers)
    streamed = stream_transformer(transformer, CPU)
    draw(transformer, passes=2)
    count = len(pieces_of(transformer.transformer_blocks))
    expected = prefetched(list(range(count)))
    assert events == [expected[0], "copy 0", *expected[1:], *expected]
    assert streamed.copies == 2 * count + 1


def test_each_kind_of_pass_is_prefetched_by_the_last_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    events = watched(monkeypatch)
    transformer = make_transformer(layers=1)
    stream_transformer(transformer, CPU)

    def between(step: int) -> None:
        if step == 2:
            events.clear()
        draw(transformer, passes=1)

    train_steps(transformer, steps=4, between=between)
    assert events == 2 * [*prefetched([0, 1, 2, 3, 4]), *prefetched([0, 1, 2, 3, 4, 2])]


def test_an_unexpected_order_costs_copies_and_nothing_else() -> None:
    plain, transformer = make_transformer(), make_transformer()
    streamed = stream_poisoned(transformer)

    def run(transformer: SD3Transformer2DModel) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                transformer(**inputs(0, CPU), skip_layers=skipped).sample
                for skipped in ([2, 3], [0], [5], [0, 1, 2, 3, 4], [1, 3, 5], [], [4], [])
            ]

    expected = run(plain)
    with late_copies():
        assert all(map(torch.equal, run(transformer), expected))
        before = streamed.copies
        draw(transformer, passes=2)
    assert streamed.copies == before + 2 * PIECES  # the last pass was whole, and as expected


def test_passes_that_leave_out_blocks_are_prefetched_too() -> None:
    """Skip-layer guidance: each second pass is shorter, and both are as they were the last time."""
    plain, transformer = make_transformer(), make_transformer()
    streamed = stream_poisoned(transformer)
    as_expected = []
    with torch.no_grad(), late_copies():
        for step in range(3):
            for skipped in (None, [1, 3]):
                drawn = transformer(**inputs(0, CPU), skip_layers=skipped).sample
                assert torch.equal(drawn, plain(**inputs(0, CPU), skip_layers=skipped).sample)
                as_expected.append(streamed._is_as_expected)
            if step == 0:
                before = streamed.copies
    assert as_expected == [True, False, True, True, True, True]
    left_out = sum(
        ".1." in name or ".3." in name for piece in pieces_of(plain.transformer_blocks) for name in piece.names[:1]
    )
    assert streamed.copies - before <= 2 * (2 * PIECES - left_out) + 1


@pytest.mark.parametrize("count", [0, BLOCKS])
def test_a_pass_that_is_given_up(count: int) -> None:
    """In forward; then in backward; then before backward."""

    def gradients(transformer: SD3Transformer2DModel) -> list[torch.Tensor]:
        return step_back(transformer, transformer(**inputs(0, CPU)).sample.square().mean())

    plain, transformer = make_transformer(), make_transformer()
    stream_poisoned(transformer)
    recompute_blocks(transformer, range(count))
    expected = gradients(plain)
    with late_copies():
        hook = transformer.transformer_blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transformer(**inputs(1, CPU))
        hook.remove()
        velocity = transformer(**inputs(1, CPU)).sample
        hook = transformer.transformer_blocks[3].attn.to_q.lora_B.default.weight.register_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            velocity.mean().backward()
        hook.remove()
        transformer.zero_grad()
        transformer(**inputs(1, CPU))
        assert all(map(torch.equal, gradients(transformer), expected))


def test_a_copy_that_fails_leaves_both_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a file is gone for a while, or the user interrupts a read and goes on."""
    expected, transformer = draw(make_transformer()), make_transformer()
    stream_transformer(transformer, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(PinnedPieces, "fill", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                draw(transformer)
    assert all(map(torch.equal, draw(transformer), expected))


# Memory, and where things are


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_two_buffers_of_the_largest_piece() -> None:
    """On the host all weights can be read, whatever is on the device."""
    transformer = make_transformer()
    expected = {name: p.clone() for name, p in transformer.named_parameters() if not p.requires_grad}
    sizes = [
        sum(-(-weight.numel() * weight.element_size() // 512) * 512 for weight in piece.weights)
        for piece in pieces_of(transformer.transformer_blocks)
    ]
    streamed = stream_transformer(transformer, CPU)
    assert len(set(sizes)) == 6
    assert streamed.host_bytes == pinned_bytes(sizes)
    buffers = [slot.buffer for slot in streamed._slots]
    assert streamed.device_bytes == 2 * max(sizes) == sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    recompute_blocks(transformer, range(3))
    train_steps(transformer)
    assert {storage(slot.buffer) for slot in streamed._slots} == set(map(storage, buffers))
    for slot in streamed._slots:
        assert {storage(weight) for weight in slot.weights} == {storage(slot.buffer)}
    weights = transformer.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_all_but_the_matrices_is_sent_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the parameters are still those that an optimizer was given."""
    transformer = make_transformer()
    parameters = list(transformer.parameters())
    streamed_blocks = {
        weight.data_ptr() for piece in pieces_of(transformer.transformer_blocks) for weight in piece.weights
    }
    staying = {tensor.data_ptr() for tensor in (*parameters, *transformer.buffers())} - streamed_blocks
    sent, to = [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *words: sent.append((self.data_ptr(), *words)) or to(self, *words)
    )
    stream_transformer(transformer, CPU)
    assert set(sent) == {(address, CPU) for address in staying}
    assert list(map(id, transformer.parameters())) == list(map(id, parameters))


@contextmanager
def without_collector() -> Iterator[None]:
    """What is in a reference cycle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_the_pieces_own_memory_is_given_back() -> None:
    """Beside the buffers nothing holds the weights as they were loaded."""
    transformer = make_transformer()
    pieces = pieces_of(transformer.transformer_blocks)
    loaded = [weakref.ref(weight.untyped_storage()) for piece in pieces for weight in piece.weights]
    del pieces
    with without_collector():
        stream_transformer(transformer, CPU)
        assert [reference() for reference in loaded] == [None] * len(loaded)


@pytest.mark.parametrize("make", [make_transformer, lambda: make_nf4(CPU, torch.float32)], ids=["plain", "nf4"])
def test_what_is_dropped_is_gone_at_once(make: Callable[[], SD3Transformer2DModel]) -> None:
    """A graph, with the activations that it kept; then the transformer, with the buffers of the host and the device."""
    transformer = make()
    streamed: Any = stream_transformer(transformer, CPU)
    made: list[weakref.ref] = []
    for name, module in transformer.named_modules():
        if name.endswith((".net.0", ".net.2", ".to_q")):
            module.register_forward_hook(lambda *words: made.append(weakref.ref(words[2].untyped_storage())))
    with without_collector():
        loss = transformer(**inputs(0, CPU)).sample.square().mean()
        assert sum(reference() is not None for reference in made) >= BLOCKS
        del loss
        assert [reference() for reference in made] == [None] * len(made)
        transformer(**inputs(0, CPU)).sample.square().mean().backward()
        assert [reference() for reference in made] == [None] * len(made)
        held = [weakref.ref(whole) for whole in (streamed, streamed._source, *transformer.modules())]
        held += [weakref.ref(slot.buffer.untyped_storage()) for slot in streamed._slots]
        held += [weakref.ref(buffer.untyped_storage()) for buffer in streamed._source._buffers]
        assert all(reference() is not None for reference in held)
        for module in transformer.modules():
            if hasattr(getattr(module, "weight", None), "module"):
                module.weight.module = None  # bitsandbytes' own cycle
        del streamed, transformer, module
        assert [reference() for reference in held] == [None] * len(held)


class Captures:
    """Counts the copies of passes of which some are captured, and replayed between the others.

    A replay, for which nothing here stands but this, leaves rubbish in the buffers.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, buffers: int = 2):
        self.transformer = make_transformer()
        self.streamed = stream_transformer(self.transformer, CPU, buffers=buffers)
        recompute_blocks(self.transformer, range(BLOCKS))
        self.loaded: list[int] = []
        self._patch, source = monkeypatch, self.streamed._source

        def fill(index: int, place: torch.Tensor) -> None:
            self.loaded.append(index)
            PinnedPieces.fill(source, index, place)  # type: ignore[arg-type]

        monkeypatch.setattr(source, "fill", fill)

    def step(self, captured: bool = False) -> list[int]:
        """The pieces that a pass copies."""
        self._patch.setattr(sd3_lora.transformer.streaming, "_is_capturing", lambda _: captured)
        before = len(self.loaded)
        self.transformer(**inputs(0, CPU)).sample.square().mean().backward()
        return self.loaded[before:]

    def draw(self) -> torch.Tensor:
        """What the transformer computes without a gradient."""
        self._patch.setattr(sd3_lora.transformer.streaming, "_is_capturing", lambda _: False)
        with torch.no_grad():
            return self.transformer(**inputs(0, CPU)).sample

    def replay(self) -> None:
        """Whatever a graph copies."""
        for slot in self.streamed._slots:
            slot.buffer.fill_(7)


def test_a_captured_pass_brings_all_that_it_needs_and_leaves_no_copy_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a pass between replays: the graph would write where its copy goes."""
    passes = Captures(monkeypatch)
    _, _, steady, first, second, after, again = [
        passes.step(captured) for captured in (False, False, False, True, True, False, False)
    ]
    assert first == second == [0, *steady[:-1]]  # nothing from before; nothing for what comes after
    assert after == again == first


@pytest.mark.parametrize("buffers", [2, 6, 40])  # of 40 each piece has one, and stays there
def test_passes_between_replays_find_their_pieces(monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    """A step is captured and replayed, and a picture of several passes is drawn after each replay."""
    passes = Captures(monkeypatch, buffers)
    expected = passes.draw()
    passes.step(captured=True)
    for _ in range(3):
        passes.replay()
        assert all(torch.equal(passes.draw(), expected) for _ in range(3))


def test_buffers_are_kept_again_after_the_graph_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Captures(monkeypatch)
    steady = [passes.step() for _ in range(3)][-1]
    expected = passes.draw()
    call = CapturedCall(passes.step, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(sd3_lora.transformer.streaming, "call_in_capture", lambda: call)
        passes.step(captured=True)
    passes.replay()
    call._give_up()
    assert torch.equal(passes.draw(), expected)
    assert [passes.step() for _ in range(3)][-1] == steady


def test_a_call_that_is_dropped_is_replayed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what streams does not keep it, which would keep all."""
    passes = Captures(monkeypatch)
    calls = [CapturedCall(passes.step, CPU)]
    with monkeypatch.context() as patch:
        patch.setattr(sd3_lora.transformer.streaming, "call_in_capture", lambda: calls[-1])
        passes.step(captured=True)
    assert passes.streamed._may_be_replayed
    reference = weakref.ref(calls.pop())
    gc.collect()
    assert reference() is None
    passes.step()
    assert not passes.streamed._may_be_replayed
