"""Blocks read from their files at each visit: the numbers of resident ones, and no buffer that is used too early."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import sd3_lora.mapped_blocks
from sd3_lora.base_weights import load_transformer
from sd3_lora.checkpointing import checkpoint_blocks
from sd3_lora.command_line import UserError
from sd3_lora.lora import attach_lora, lora_tensors, target_modules
from sd3_lora.mapped_blocks import RING_SIZE, MappedBlocks
from sd3_lora.model_files import MINIATURE, ModelConfig, ModelFiles
from sd3_lora.streaming import PinnedBlocks, StreamedBlocks, frozen_tensors, stream_transformer
from sd3_lora.tensor_files import TensorFiles

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from small_transformer import CPU, GPU, inputs, late_copies, make_transformer, needs_gpu, train_steps
from test_streaming import PoisonedBlocks, draw

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
    """`make_transformer`, with its blocks' frozen weights as `load_transformer` leaves them unread."""
    transformer = make_transformer(**words)
    for block in transformer.transformer_blocks:
        for tensor in frozen_tensors(block):
            tensor.data = torch.full((), torch.nan, dtype=tensor.dtype).expand(tensor.shape)
    return transformer


def stream(transformer: SD3Transformer2DModel, paths: list[Path], device: torch.device = CPU) -> StreamedBlocks:
    return stream_transformer(transformer, device, MappedBlocks(transformer.transformer_blocks, device, paths))


# To the bit


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6])
def test_training_is_that_of_resident_blocks(layers: int, offload: bool, shards: int, tmp_path: Path) -> None:
    plain = train_steps(make_transformer(layers, 0.3))
    transformer = make_unread(layers=layers, dropout=0.3)
    stream(transformer, save_base(tmp_path, layers, shards=shards))
    checkpoint_blocks(transformer, layers, offload)
    assert train_steps(transformer).is_equal(plain)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_another_dtype_are_converted_as_they_are_read(
    saved: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    paths = save_base(tmp_path, dtype=saved)
    results = []
    for source in ("resident", "pinned", "mapped"):
        transformer = make_unread(dtype=dtype) if source == "mapped" else make_transformer(dtype=dtype)
        with TensorFiles(paths) as weights:
            for name, parameter in transformer.named_parameters():
                if ".lora_" not in name and not (source == "mapped" and name.startswith("transformer_blocks.")):
                    parameter.data = weights.tensor(name.replace(".base_layer.", ".")).to(dtype)
        if source == "pinned":
            stream_transformer(transformer, CPU)
        elif source == "mapped":
            stream(transformer, paths)
        checkpoint_blocks(transformer, BLOCKS)
        results.append((train_steps(transformer, dtype=dtype), draw_in(transformer, dtype)))
    for trained, drawn in results[1:]:
        assert trained.is_equal(results[0][0])
        assert torch.equal(drawn, results[0][1])


@torch.no_grad()
def draw_in(transformer: SD3Transformer2DModel, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype):
        return transformer(**inputs(1, CPU, dtype)).sample


@pytest.mark.parametrize("layers", [6, 5])
def test_nothing_stale_is_read_however_late_the_copies(layers: int, tmp_path: Path) -> None:
    plain = make_transformer(layers, 0.3)
    expected = train_steps(plain, between=lambda step: draw(plain, step))
    transformer = make_unread(layers=layers, dropout=0.3)
    source = MappedBlocks(transformer.transformer_blocks, CPU, save_base(tmp_path, layers))
    PoisonedBlocks(transformer.transformer_blocks, CPU, source)
    checkpoint_blocks(transformer, layers, offload_inputs=True)
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
    loaded = [load_transformer(files, CPU, dtype, latent_size=(8, 8), unread_blocks=unread) for unread in (True, False)]
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


def test_unread_blocks_are_neither_read_nor_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, names = TensorFiles.tensor, []
    monkeypatch.setattr(TensorFiles, "tensor", lambda self, name: names.append(name) or tensor(self, name))
    files = ModelFiles(ModelConfig(str(MINIATURE)))
    transformer = load_transformer(files, CPU, torch.float16, unread_blocks=True)
    assert names
    assert not [name for name in names if name.startswith("transformer_blocks.")]
    for block in transformer.transformer_blocks:
        for parameter in block.parameters():
            assert parameter.untyped_storage().nbytes() == 2
            assert parameter.isnan().all()


def test_only_the_ring_is_in_memory(tmp_path: Path) -> None:
    transformer = make_unread()
    source = MappedBlocks(transformer.transformer_blocks, CPU, save_base(tmp_path))
    streamed = stream_transformer(transformer, CPU, source)
    plain = PinnedBlocks(list(make_transformer().transformer_blocks), CPU)
    assert source.sizes == plain.sizes
    assert streamed.host_bytes == RING_SIZE * max(source.sizes) == sum(slot.buffer.numel() for slot in source._slots)
    assert plain.host_bytes == sum(plain.sizes)
    checkpoint_blocks(transformer, BLOCKS)
    train_steps(transformer)
    for block, held in zip(transformer.transformer_blocks, [True, True, *[False] * 4], strict=True):
        assert all(tensor.isnan().all() != held for tensor in frozen_tensors(block))


# Reading ahead


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the source, in order: `read 3` as the thread is told to, `copy 3`, and `visit 3`."""
    events: list[str] = []
    fill, visit, slot = MappedBlocks.fill, StreamedBlocks._visit, MappedBlocks._slot

    def watch_slot(self: MappedBlocks, index: int) -> Any:
        if all(slot.index != index for slot in self._slots):
            events.append(f"read {index}")
        return slot(self, index)

    def watch_fill(self: MappedBlocks, index: int, destination: torch.Tensor) -> None:
        fill(self, index, destination)
        events.append(f"copy {index}")

    def watch_visit(self: StreamedBlocks, index: int) -> None:
        events.append(f"visit {index}")
        visit(self, index)

    monkeypatch.setattr(MappedBlocks, "_slot", watch_slot)
    monkeypatch.setattr(MappedBlocks, "fill", watch_fill)
    monkeypatch.setattr(StreamedBlocks, "_visit", watch_visit)
    return events


def test_each_block_of_training_is_read_while_two_others_are_copied_and_compute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At the seams what is in the ring and on the device is not read again."""
    events = watched(monkeypatch)
    transformer = make_unread()
    stream(transformer, save_base(tmp_path))
    checkpoint_blocks(transformer, BLOCKS)
    train_steps(transformer, steps=2)
    forward = "visit 1, copy 2, read 3, visit 2, copy 3, read 4, visit 3, copy 4, read 5, visit 4, copy 5, visit 5"
    backward = "visit 5, visit 4, copy 3, read 2, visit 3, copy 2, read 1, visit 2, copy 1, read 0, visit 1, copy 0"
    first = "visit 0, read 0, copy 0, read 1, copy 1, read 2"
    assert ", ".join(events) == f"{first}, {forward}, {backward}, visit 0, visit 0, {forward}, {backward}, visit 0"


@pytest.mark.parametrize("layers", [5, 6])
def test_each_block_of_drawing_is_read_ahead(layers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events = watched(monkeypatch)
    transformer = make_unread(layers=layers)
    stream(transformer, save_base(tmp_path, layers))
    draw(transformer, passes=3)
    for index in range(layers):
        told = [at for at, event in enumerate(events) if event == f"read {index}"][1:]
        copied = [at for at, event in enumerate(events) if event == f"copy {index}"][1:]
        # A visit at least lies between: that of a block that computes while this one is read.
        for start, end in zip(told, copied, strict=False):
            assert any(event.startswith("visit") for event in events[start:end]), (index, events)
    assert events.count("read 3") == 3


def test_the_caller_does_not_wait_for_what_it_announces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensor, go_on, readers = TensorFiles.tensor, threading.Event(), set()

    def slow(self: TensorFiles, name: str) -> torch.Tensor:
        readers.add(threading.current_thread())
        assert go_on.wait(20)
        return tensor(self, name)

    transformer = make_unread()
    source = MappedBlocks(transformer.transformer_blocks, CPU, save_base(tmp_path))
    monkeypatch.setattr(TensorFiles, "tensor", slow)
    source.announce(4)
    source.announce(2)
    go_on.set()
    destination = torch.empty(source.sizes[2], dtype=torch.uint8)
    source.fill(2, destination)
    assert threading.current_thread() not in readers
    assert len(readers) == 1
    expected = PinnedBlocks(list(make_transformer().transformer_blocks), CPU)
    assert same_tensors(destination, source, expected, 2)


def same_tensors(buffer: torch.Tensor, source: MappedBlocks, expected: PinnedBlocks, index: int) -> bool:
    """What lies between tensors is anything."""
    found = sd3_lora.mapped_blocks.views(buffer, source.tensors(index))
    return all(map(torch.equal, found, expected.tensors(index)))


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
    monkeypatch.setattr(sd3_lora.mapped_blocks, "_record", lambda _: copies.append(Unfinished()) or copies[-1])
    transformer = make_unread()
    source = MappedBlocks(transformer.transformer_blocks, CPU, save_base(tmp_path))
    expected = PinnedBlocks(list(make_transformer().transformer_blocks), CPU)
    room = [torch.empty(size, dtype=torch.uint8) for size in source.sizes]
    for index in range(RING_SIZE):
        source.fill(index, room[index])
    (slot,) = [slot for slot in source._slots if slot.index == 0]
    source.announce(3)  # at once: it is the thread that waits
    assert slot.index == 3
    assert copies[0].is_waited_for.wait(20)
    assert not slot.reading.done()
    assert same_tensors(slot.buffer, source, expected, 0)
    copies[0].through.set()
    source.fill(3, room[3])
    assert same_tensors(room[3], source, expected, 3)
    assert not copies[1].is_waited_for.is_set()


def test_what_was_copied_last_is_read_over_last(tmp_path: Path) -> None:
    """As where forward and backward meet: the copy of the third last block has just begun."""
    transformer = make_unread()
    source = MappedBlocks(transformer.transformer_blocks, CPU, save_base(tmp_path))
    for index in (3, 4, 5, 3):
        source.fill(index, torch.empty(source.sizes[index], dtype=torch.uint8))
    source.announce(2)
    assert [slot.index for slot in source._slots] == [5, 3, 2]


# What goes wrong, and what is left


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_file_that_vanishes_is_told_in_a_sentence(how: str, in_backward: bool, tmp_path: Path) -> None:
    paths = save_base(tmp_path, layers=12)
    transformer = make_unread(layers=12)
    stream(transformer, paths)
    checkpoint_blocks(transformer, 12)
    if in_backward:
        loss = transformer(**inputs(0, CPU)).sample.square().mean()
    if how == "removed":
        paths[1].unlink()
    else:
        os.truncate(paths[1], 1000)
    with pytest.raises(UserError, match=f"^{paths[1]} was removed or changed while it was read: put it back, and "):
        loss.backward() if in_backward else transformer(**inputs(0, CPU))


def test_a_ring_is_pinned_and_unpinned_when_nothing_reads_into_it_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pinned: set[int] = set()
    go_on, tensor = threading.Event(), TensorFiles.tensor

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            pinned.add(address)
            return 2 if len(pinned) == Cudart.refused else 0

        def cudaHostUnregister(self, address: int) -> int:
            pinned.remove(address)
            return 0

        refused = 0

    def slow(self: TensorFiles, name: str) -> torch.Tensor:
        assert go_on.wait(20)
        return tensor(self, name)

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(TensorFiles, "tensor", slow)
    paths, transformer = save_base(tmp_path), make_unread()
    source: Any = MappedBlocks(transformer.transformer_blocks, GPU, paths)
    assert pinned == {slot.buffer.data_ptr() for slot in source._slots}
    assert len(pinned) == RING_SIZE
    source.announce(0)
    (thread,) = source._thread._threads
    reading: Future[None] = source._slots[-1].reading
    gone = weakref.ref(source)
    del source
    gc.collect()
    assert gone() is None
    assert len(pinned) == 1  # what the thread still reads into
    go_on.set()
    reading.result()
    thread.join(20)
    assert not thread.is_alive()
    assert not pinned

    Cudart.refused = 2
    with pytest.raises(UserError, match=r"^the driver did not pin 0\.0 GiB of host memory .* \(CUDA error 2\): "):
        MappedBlocks(transformer.transformer_blocks, GPU, paths)


# On a GPU


@needs_gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_a_gpu_trains_the_same(saved: torch.dtype, offload: bool, tmp_path: Path) -> None:
    words: dict[str, Any] = {"dropout": 0.3, "dtype": torch.float16}
    plain = train_steps(make_transformer(**words).to(GPU), GPU, steps=5, dtype=torch.float16)
    transformer = make_unread(**words)
    stream(transformer, save_base(tmp_path, dtype=saved), GPU)
    checkpoint_blocks(transformer, BLOCKS, offload)
    assert train_steps(transformer, GPU, steps=5, dtype=torch.float16).is_equal(plain)


@needs_gpu
def test_a_gpu_draws_the_same(tmp_path: Path) -> None:
    plain = draw(make_transformer().to(GPU), 5, GPU)
    transformer = make_unread()
    streamed = stream(transformer, save_base(tmp_path), GPU)
    assert all(slot.buffer.is_pinned() for slot in streamed._source._slots)
    assert all(map(torch.equal, draw(transformer, 5, GPU), plain))
