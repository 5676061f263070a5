"""Pieces that are streamed from their files: the numbers of resident ones, and no buffer that is used too early."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import sd3_lora.transformer.mapped_pieces
from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.gpu.packed_tensors import views
from sd3_lora.gpu.pinned_memory import pinned_bytes
from sd3_lora.transformer.base_weights import load_transformer
from sd3_lora.transformer.lora import attach_lora, lora_tensors, target_modules
from sd3_lora.transformer.mapped_pieces import RING_SIZE, MappedPieces
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import Piece, PinnedPieces, StreamedBlocks, pieces_of, stream_transformer

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from small_transformer import CPU, GPU, inputs, late_copies, make_transformer, needs_gpu, train_steps
from test_streaming import draw, prefetched, stream_poisoned

BLOCKS = 6


def save_base(folder: Path, layers: int = BLOCKS, dtype: torch.dtype = torch.float32, shards: int = 2) -> list[Path]:
    """The weights of `make_transformer`, without its LoRA, spread over files."""
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in make_transformer(layers, dtype=dtype).state_dict().items()
        if ".lora_" not in name
    }
    paths = [folder / f"{index}.safetensors" for index in range(shards)]
    for index, path in enumerate(paths):
        save_file({name: weights[name].contiguous() for name in list(weights)[index::shards]}, path)
    return paths


def make_unread(**words: Any) -> SD3Transformer2DModel:
    """`make_transformer`, with its blocks' matrices as `load_transformer` leaves them unread."""
    transformer = make_transformer(**words)
    for piece in pieces_of(transformer.transformer_blocks):
        for layer in piece.layers:
            weight = layer.weight
            weight.data = torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape)
    return transformer


def source_of(transformer: SD3Transformer2DModel, paths: list[Path], device: torch.device = CPU) -> MappedPieces:
    return MappedPieces(pieces_of(transformer.transformer_blocks), device, paths)


def stream(transformer: SD3Transformer2DModel, paths: list[Path], device: torch.device = CPU) -> StreamedBlocks:
    return stream_transformer(transformer, device, source_of(transformer, paths, device))


# To the bit


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("layers", [1, 2, 6])
def test_training_is_that_of_resident_blocks(layers: int, offload: bool, shards: int, tmp_path: Path) -> None:
    plain = train_steps(make_transformer(layers, 0.3))
    paths = save_base(tmp_path, layers, shards=shards)
    for count in sorted({0, 1, layers - 1, layers}):
        transformer = make_unread(layers=layers, dropout=0.3)
        stream(transformer, paths)
        recompute_blocks(transformer, range(count), offload)
        assert train_steps(transformer).is_equal(plain)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_another_dtype_are_converted_as_they_are_read(
    saved: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    paths = save_base(tmp_path, dtype=saved)
    results = []
    for source in ("resident", "pinned", "read and pinned", "mapped"):
        unread = source in ("read and pinned", "mapped")
        transformer = make_unread(dtype=dtype) if unread else make_transformer(dtype=dtype)
        with TensorFiles(paths) as weights:
            for name, parameter in transformer.named_parameters():
                is_unread = unread and name.startswith("transformer_blocks.") and parameter.dim() == 2
                if ".lora_" not in name and not is_unread:
                    parameter.data = weights.tensor(name.replace(".base_layer.", ".")).to(dtype)
        if source == "pinned":
            stream_transformer(transformer, CPU)
        elif source == "read and pinned":
            pieces = pieces_of(transformer.transformer_blocks)
            stream_transformer(transformer, CPU, PinnedPieces(pieces, CPU, paths))
            assert not any(weight.isnan().any() for piece in pieces for weight in piece.weights)
        elif source == "mapped":
            stream(transformer, paths)
        recompute_blocks(transformer, range(BLOCKS))
        results.append((train_steps(transformer, dtype=dtype), draw_in(transformer, dtype)))
    for trained, drawn in results[1:]:
        assert trained.is_equal(results[0][0])
        assert torch.equal(drawn, results[0][1])


@torch.no_grad()
def draw_in(transformer: SD3Transformer2DModel, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype):
        return transformer(**inputs(1, CPU, dtype)).sample


@pytest.mark.parametrize("count", [0, 3, BLOCKS])
def test_nothing_stale_is_read_however_late_the_copies(count: int, tmp_path: Path) -> None:
    plain = make_transformer(dropout=0.3)
    expected = train_steps(plain, between=lambda step: draw(plain, step))
    transformer = make_unread(dropout=0.3)
    stream_poisoned(transformer, source_of(transformer, save_base(tmp_path)))
    recompute_blocks(transformer, range(count), offload_inputs=True)
    with late_copies():
        assert train_steps(transformer, between=lambda step: draw(transformer, step)).is_equal(expected)


def test_an_unexpected_order_costs_reads_and_nothing_else(tmp_path: Path) -> None:
    plain, streamed = make_transformer(), make_unread()
    stream(streamed, save_base(tmp_path))

    def run(transformer: SD3Transformer2DModel) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                transformer(**inputs(0, CPU), skip_layers=skipped).sample
                for skipped in ([2, 3], [0], [5], [0, 1, 2, 3, 4], [1, 3, 5], [], [4])
            ]

    assert all(map(torch.equal, run(streamed), run(plain)))


# Weights that are not read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_lora_on_unread_blocks_is_the_one_on_read_blocks(dtype: torch.dtype) -> None:
    """The same draws, in memory of its own, on the host; and the same forward once the blocks are streamed."""
    files = ModelFiles(ModelConfig(str(MINIATURE)))
    loaded = [load_transformer(files, CPU, dtype, latent_size=(8, 8), streamed_blocks=some) for some in (range(6), ())]
    loras = []
    for transformer in loaded:
        for parameter in attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.0, seed=7):
            assert (parameter.device, parameter.dtype) == (CPU, torch.float32)
            assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        loras.append(lora_tensors(transformer))
    assert loras[0].keys() == loras[1].keys()
    assert all(torch.equal(loras[0][name], loras[1][name]) for name in loras[0])
    assert any(tensor.any() for tensor in loras[0].values())
    unread, read = loaded
    mine, theirs = dict(unread.named_parameters()), dict(read.named_parameters())
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in mine.items()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in theirs.items()
    }
    stream(unread, files.weight_files("transformer"))
    words = {
        "hidden_states": torch.randn(1, read.config.in_channels, 8, 8).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 9, read.config.joint_attention_dim).to(dtype),
        "pooled_projections": torch.randn(1, read.config.pooled_projection_dim).to(dtype),
    }
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(unread(**words).sample, read(**words).sample)


@pytest.mark.parametrize("streamed_blocks", [range(6), (1, 4)])
def test_unread_matrices_are_neither_read_nor_in_memory(streamed_blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, read = TensorFiles.tensor, []
    monkeypatch.setattr(TensorFiles, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    files = ModelFiles(ModelConfig(str(MINIATURE)))
    transformer = load_transformer(files, CPU, torch.float16, streamed_blocks=streamed_blocks)
    pieces = pieces_of(transformer.transformer_blocks, streamed_blocks)
    unread = {name for piece in pieces for name in piece.names}
    assert set(read) == transformer.state_dict().keys() - unread
    for name, tensor in transformer.state_dict().items():
        assert tensor.isnan().all() == (name in unread)
        assert (tensor.untyped_storage().nbytes() == 2) == (name in unread)


def test_only_the_ring_is_in_memory(tmp_path: Path) -> None:
    transformer = make_unread()
    source = source_of(transformer, save_base(tmp_path))
    streamed = stream_transformer(transformer, CPU, source)
    plain = PinnedPieces(pieces_of(make_transformer().transformer_blocks), CPU)
    assert source.sizes == plain.sizes
    ring = [max(source.sizes)] * RING_SIZE
    assert [slot.buffer.numel() for slot in source._slots] == ring
    assert streamed.host_bytes == pinned_bytes(ring) < plain.host_bytes / 5
    assert plain.host_bytes == pinned_bytes(plain.sizes)
    train_steps(transformer)
    for piece in pieces_of(transformer.transformer_blocks):
        assert [weight.untyped_storage().nbytes() for weight in piece.weights] == [4] * len(piece.names)
        assert all(weight.isnan().all() for weight in piece.weights)


# Reading ahead


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the source, in order: `read 3` as the thread is told to, `copy 3`, and `visit 3`."""
    events: list[str] = []
    fill, visit, slot = MappedPieces.fill, StreamedBlocks._stream, MappedPieces._slot

    def watch_slot(self: MappedPieces, index: int) -> Any:
        if all(slot.index != index for slot in self._slots):
            events.append(f"read {index}")
        return slot(self, index)

    def watch_fill(self: MappedPieces, index: int, destination: torch.Tensor) -> None:
        fill(self, index, destination)
        events.append(f"copy {index}")

    def watch_visit(self: StreamedBlocks, index: int) -> Any:
        events.append(f"visit {index}")
        return visit(self, index)

    monkeypatch.setattr(MappedPieces, "_slot", watch_slot)
    monkeypatch.setattr(MappedPieces, "fill", watch_fill)
    monkeypatch.setattr(StreamedBlocks, "_stream", watch_visit)
    return events


def read_ahead(events: list[str]) -> list[str]:
    """With a read where a piece is prefetched that is not among the three latest prefetched or copied."""
    ring: list[str] = []
    for _ in range(2):
        found = []
        for event in events:
            what, index = event.split()
            if what != "prefetch":
                found.append(event)
            elif index not in ring:
                found.append(f"read {index}")
            if what != "visit":
                ring = [*(other for other in ring if other != index), index][-RING_SIZE:]
    return found


@pytest.mark.parametrize(
    ("count", "asked"),
    [
        (None, [*range(11)]),
        (0, [*range(11), 9, 8, 5, 4, 2]),
        (2, [*range(11), *range(6, 11), 9, 8, *range(6), 4, 2]),
    ],
    ids=["drawing", "training", "training again"],
)
def test_each_piece_is_read_while_two_others_are_copied_and_compute(
    count: int | None, asked: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the third pass on."""
    events = watched(monkeypatch)
    transformer = make_unread(layers=2)
    stream(transformer, save_base(tmp_path, 2))
    if count is None:
        draw(transformer, passes=2)
        events.clear()
        draw(transformer, passes=1)
    else:
        recompute_blocks(transformer, range(count))
        train_steps(transformer, steps=3, between=lambda _: events.clear())
    assert events == read_ahead(prefetched(asked))


def test_the_caller_does_not_wait_for_what_it_prefetches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensor, go_on, readers = TensorFiles.tensor, threading.Event(), set()

    def slow(self: TensorFiles, name: str) -> torch.Tensor:
        readers.add(threading.current_thread())
        assert go_on.wait(20)
        return tensor(self, name)

    transformer = make_unread()
    source = source_of(transformer, save_base(tmp_path))
    monkeypatch.setattr(TensorFiles, "tensor", slow)
    source.prefetch(4)
    source.prefetch(2)
    go_on.set()
    destination = torch.empty(source.sizes[2], dtype=torch.uint8)
    source.fill(2, destination)
    assert threading.current_thread() not in readers
    assert len(readers) == 1
    expected = pieces_of(make_transformer().transformer_blocks)
    assert same_tensors(destination, expected[2])


def same_tensors(buffer: torch.Tensor, piece: Piece) -> bool:
    """What lies between tensors is anything."""
    return all(map(torch.equal, views(buffer, piece.weights), piece.weights))


class Unfinished:
    """A copy to a device that is under way until `through` is set."""

    def __init__(self) -> None:
        self.through, self.is_waited_for = threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.is_waited_for.set()
        assert self.through.wait(20)


def test_no_slot_is_read_into_while_a_copy_from_it_is_under_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copies: list[Unfinished] = []
    monkeypatch.setattr(
        sd3_lora.transformer.mapped_pieces, "_record", lambda _: copies.append(Unfinished()) or copies[-1]
    )
    transformer = make_unread()
    source = source_of(transformer, save_base(tmp_path))
    expected = pieces_of(make_transformer().transformer_blocks)
    room = [torch.empty(size, dtype=torch.uint8) for size in source.sizes]
    for index in range(RING_SIZE):
        source.fill(index, room[index])
    (slot,) = [slot for slot in source._slots if slot.index == 0]
    source.prefetch(3)  # at once: it is the thread that waits
    assert slot.index == 3
    assert copies[0].is_waited_for.wait(20)
    assert not slot.reading.done()
    assert same_tensors(slot.buffer, expected[0])
    copies[0].through.set()
    source.fill(3, room[3])
    assert same_tensors(room[3], expected[3])
    assert not copies[1].is_waited_for.is_set()


def test_what_was_copied_last_is_read_over_last(tmp_path: Path) -> None:
    """As where forward and backward meet: the copy of a piece before the last two has just begun."""
    transformer = make_unread()
    source = source_of(transformer, save_base(tmp_path))
    for index in (3, 4, 5, 3):
        source.fill(index, torch.empty(source.sizes[index], dtype=torch.uint8))
    source.prefetch(2)
    assert [slot.index for slot in source._slots] == [5, 3, 2]


# What goes wrong, and what is left


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_file_that_vanishes_is_told_in_a_sentence(how: str, in_backward: bool, tmp_path: Path) -> None:
    paths = save_base(tmp_path, layers=12)
    transformer = make_unread(layers=12)
    stream(transformer, paths)
    recompute_blocks(transformer, range(12))
    if in_backward:
        loss = transformer(**inputs(0, CPU)).sample.square().mean()
    if how == "removed":
        paths[1].unlink()
    else:
        os.truncate(paths[1], 1000)
    with pytest.raises(UserError, match=f"^{paths[1]} was removed or changed while it was read: put it back, and "):
        loss.backward() if in_backward else transformer(**inputs(0, CPU))


def test_a_source_that_is_dropped_while_it_reads_goes_when_the_read_is_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go_on, tensor = threading.Event(), TensorFiles.tensor

    def slow(self: TensorFiles, name: str) -> torch.Tensor:
        assert go_on.wait(20)
        return tensor(self, name)

    monkeypatch.setattr(TensorFiles, "tensor", slow)
    source: Any = source_of(make_unread(), save_base(tmp_path), CPU)
    assert len(source._slots) == RING_SIZE
    source.prefetch(0)
    (thread,) = source._thread._threads
    reading: Future[None] = source._slots[-1].reading
    gone, ring = weakref.ref(source), weakref.ref(source._slots[0].buffer.untyped_storage())
    del source
    gc.collect()
    assert gone() is None
    assert ring() is not None  # what the thread still reads into
    go_on.set()
    reading.result()
    thread.join(20)
    assert not thread.is_alive()
    del reading
    gc.collect()
    assert ring() is None


@needs_gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("count", "offload"), [(0, False), (BLOCKS, False), (BLOCKS, True)])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_a_gpu_trains_the_same(saved: torch.dtype, count: int, offload: bool, tmp_path: Path) -> None:
    words: dict[str, Any] = {"dropout": 0.3, "dtype": torch.float16}
    plain = train_steps(make_transformer(**words).to(GPU), GPU, steps=5, dtype=torch.float16)
    transformer = make_unread(**words)
    stream(transformer, save_base(tmp_path, dtype=saved), GPU)
    recompute_blocks(transformer, range(count), offload)
    assert train_steps(transformer, GPU, steps=5, dtype=torch.float16).is_equal(plain)


@needs_gpu
def test_a_gpu_draws_the_same(tmp_path: Path) -> None:
    plain = draw(make_transformer().to(GPU), 5, GPU)
    transformer = make_unread()
    streamed = stream(transformer, save_base(tmp_path), GPU)
    assert all(slot.buffer.is_pinned() for slot in streamed._source._slots)
    assert all(map(torch.equal, draw(transformer, 5, GPU), plain))
