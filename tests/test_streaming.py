"""Streamed blocks: the numbers of resident ones bit for bit, from two buffers, with as few copies as there can be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sd3_lora.streaming
from sd3_lora.checkpointing import checkpoint_blocks
from sd3_lora.command_line import UserError
from sd3_lora.lora import attach_lora, save_lora, target_modules
from sd3_lora.streaming import PinnedBlocks, StreamedBlocks, frozen_tensors, stream_transformer

import pytest
import torch
from conftest import PROJECT
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from small_transformer import CPU, GPU, inputs, late_copies, make_transformer, needs_gpu, train_steps

BLOCKS = 6


def draw(transformer: SD3Transformer2DModel, passes: int = 3, device: torch.device = CPU) -> list[torch.Tensor]:
    """Forwards without a gradient, as in inference."""
    with torch.no_grad():
        return [transformer(**inputs(step, device)).sample.cpu() for step in range(passes)]


class PoisonedBlocks(StreamedBlocks):
    """A buffer is NaN from the moment that its block may be overwritten; and the copy is late (`late_copies`).

    A block that computed from the host's memory would be right on a CPU and an error on a GPU, so it is one here.
    """

    def _visit(self, index: int) -> None:
        super()._visit(index)
        assert all(lies_in(tensor, self._buffers[index % 2]) for tensor in self._tensors[index])

    def _load(self, index: int) -> None:
        super()._load(index)
        self._buffers[index % 2].view(torch.float32).fill_(torch.nan)


# To the bit


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6])
def test_training_is_that_of_resident_blocks(layers: int, offload: bool, dropout: float) -> None:
    plain = train_steps(make_transformer(layers, dropout))
    transformer = make_transformer(layers, dropout)
    stream_transformer(transformer, CPU)
    checkpoint_blocks(transformer, layers, offload)
    assert train_steps(transformer).is_equal(plain)


@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("layers", [6, 5])
def test_nothing_stale_is_read_however_late_the_copies(layers: int, count: int) -> None:
    plain = train_steps(make_transformer(layers, 0.3))
    transformer = make_transformer(layers, 0.3)
    PoisonedBlocks(transformer.transformer_blocks, CPU)
    checkpoint_blocks(transformer, min(count, layers), offload_inputs=True)
    with late_copies():
        assert train_steps(transformer).is_equal(plain)


@pytest.mark.parametrize("layers", [1, 2, 5, 6])
def test_inference_is_that_of_resident_blocks(layers: int) -> None:
    plain = draw(make_transformer(layers))
    transformer = make_transformer(layers)
    PoisonedBlocks(transformer.transformer_blocks, CPU)
    with late_copies():
        assert all(map(torch.equal, draw(transformer), plain))


def test_pictures_between_the_steps_change_nothing() -> None:
    plain = train_steps(make_transformer())
    transformer = make_transformer()
    PoisonedBlocks(transformer.transformer_blocks, CPU)
    checkpoint_blocks(transformer, BLOCKS)
    with late_copies():
        assert train_steps(transformer, between=lambda step: draw(transformer, step)).is_equal(plain)


def test_bf16_and_mixed_dtypes() -> None:
    def make() -> SD3Transformer2DModel:
        transformer = make_transformer(dtype=torch.bfloat16)
        for block in transformer.transformer_blocks:
            block.ff.net[2].float()
        return transformer

    plain = train_steps(make(), dtype=torch.bfloat16)
    transformer = make()
    stream_transformer(transformer, CPU)
    checkpoint_blocks(transformer, BLOCKS)
    assert train_steps(transformer, dtype=torch.bfloat16).is_equal(plain)


def test_the_miniature() -> None:
    """A real SD3 of 13.8 M parameters."""

    def gradients(streamed: bool) -> list[torch.Tensor]:
        transformer = SD3Transformer2DModel.from_pretrained(PROJECT / "miniature" / "transformer")
        attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.0, seed=0)
        if streamed:
            stream_transformer(transformer, CPU)
            checkpoint_blocks(transformer, 5, offload_inputs=True)
        config, generator = transformer.config, torch.Generator().manual_seed(0)
        made = []
        for _ in range(3):
            transformer(
                hidden_states=torch.randn(1, config.in_channels, 8, 8, generator=generator),
                timestep=torch.tensor([500.0]),
                encoder_hidden_states=torch.randn(1, 9, config.joint_attention_dim, generator=generator),
                pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=generator),
            ).sample.square().mean().backward()
            made += [p.grad.clone() for p in transformer.parameters() if p.requires_grad]
        return made

    assert all(map(torch.equal, gradients(True), gradients(False)))


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


@pytest.mark.parametrize("count", [6, 5])
def test_nf4_weights_are_streamed_too(count: int) -> None:
    plain = train_steps(make_nf4(CPU, torch.float32))
    transformer = make_nf4(CPU, torch.float32)
    PoisonedBlocks(transformer.transformer_blocks, CPU)
    assert transformer.transformer_blocks[0].ff.net[2].weight.dtype == torch.uint8
    checkpoint_blocks(transformer, count)
    with late_copies():
        assert train_steps(transformer).is_equal(plain)


# Copies


def test_copies_of_training() -> None:
    """The two blocks at which forward and backward meet are there already, at either end."""
    transformer = make_transformer()
    streamed = stream_transformer(transformer, CPU)
    checkpoint_blocks(transformer, BLOCKS)
    before = []
    train_steps(transformer, steps=4, between=lambda _: before.append(streamed.copies))
    assert before == [0, BLOCKS + (BLOCKS - 2), before[1] + 2 * (BLOCKS - 2), before[2] + 2 * (BLOCKS - 2)]


def test_copies_of_inference() -> None:
    """Each block once a pass; and already the first of the next one."""
    transformer = make_transformer()
    streamed = stream_transformer(transformer, CPU)
    draw(transformer, passes=1)
    assert streamed.copies == BLOCKS + 1
    draw(transformer, passes=2)
    assert streamed.copies == 3 * BLOCKS + 1


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order: `copy 3`, and `visit 3` when block 3 is ready to compute."""
    events: list[str] = []
    fill, visit = PinnedBlocks.fill, StreamedBlocks._visit

    def watch_fill(self: PinnedBlocks, index: int, destination: torch.Tensor) -> None:
        events.append(f"copy {index}")
        fill(self, index, destination)

    def watch_visit(self: StreamedBlocks, index: int) -> None:
        visit(self, index)
        events.append(f"visit {index}")

    monkeypatch.setattr(PinnedBlocks, "fill", watch_fill)
    monkeypatch.setattr(StreamedBlocks, "_visit", watch_visit)
    return events


def test_each_block_is_copied_while_the_one_before_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    events = watched(monkeypatch)
    transformer = make_transformer(layers=5)
    stream_transformer(transformer, CPU)
    checkpoint_blocks(transformer, 5)
    train_steps(transformer, steps=2)
    forward = "copy 2, visit 1, copy 3, visit 2, copy 4, visit 3, visit 4"
    backward = "visit 4, copy 2, visit 3, copy 1, visit 2, copy 0, visit 1, visit 0"
    assert ", ".join(events) == f"copy 0, copy 1, visit 0, {forward}, {backward}, visit 0, {forward}, {backward}"


@pytest.mark.parametrize(
    ("layers", "training", "announced"),
    [
        (6, True, [2, 3, 4, 5, 3, 3, 3, 2, 1, 0, 2, 2]),
        (3, True, [2, 0, 0, 0, 2, 2]),
        (2, True, []),
        (6, False, [2, 3, 4, 5, 0, 1]),
        (5, False, [2, 3, 4, 0, 1]),
        (2, False, []),
    ],
)
def test_a_source_is_told_what_will_be_asked_for_after_the_next(
    layers: int, training: bool, announced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a second pass, at each visit: unless the device has it."""
    told: list[int] = []
    monkeypatch.setattr(PinnedBlocks, "announce", lambda _, index: told.append(index))
    transformer = make_transformer(layers)
    stream_transformer(transformer, CPU)
    checkpoint_blocks(transformer, layers)
    if training:
        train_steps(transformer, steps=2, between=lambda _: told.clear())
    else:
        draw(transformer, passes=1)
        told.clear()
        draw(transformer, passes=1)
    assert told == announced


def test_an_unexpected_order_costs_copies_and_nothing_else() -> None:
    plain, streamed = make_transformer(), make_transformer()
    PoisonedBlocks(streamed.transformer_blocks, CPU)

    def run(transformer: SD3Transformer2DModel) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                transformer(**inputs(0, CPU), skip_layers=skipped).sample
                for skipped in ([2, 3], [0], [5], [0, 1, 2, 3, 4], [1, 3, 5], [], [4])
            ]

    expected = run(plain)
    with late_copies():
        assert all(map(torch.equal, run(streamed), expected))


def test_a_forward_that_is_given_up() -> None:
    def gradients(transformer: SD3Transformer2DModel) -> list[torch.Tensor]:
        transformer(**inputs(0, CPU)).sample.square().mean().backward()
        return [p.grad for p in transformer.parameters() if p.requires_grad]

    plain, transformer = make_transformer(), make_transformer()
    PoisonedBlocks(transformer.transformer_blocks, CPU)
    checkpoint_blocks(transformer, BLOCKS)
    with late_copies():
        hook = transformer.transformer_blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transformer(**inputs(1, CPU))
        hook.remove()
        transformer(**inputs(1, CPU))
        assert all(map(torch.equal, gradients(transformer), gradients(plain)))


# What autograd refuses


@pytest.mark.parametrize("count", [0, 1, 3])
def test_weights_that_are_gone_are_not_mistaken_for_others(count: int) -> None:
    """Of 6 blocks the last two may keep their activations, as their weights are still there."""
    transformer = make_transformer()
    stream_transformer(transformer, CPU)
    checkpoint_blocks(transformer, count)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train_steps(transformer, steps=1)


def test_a_pass_between_forward_and_backward_is_noticed() -> None:
    transformer = make_transformer()
    stream_transformer(transformer, CPU)
    checkpoint_blocks(transformer, 4)
    loss = transformer(**inputs(0, CPU)).sample.square().mean()
    draw(transformer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Memory, and where things are


def test_two_buffers_of_the_largest_block() -> None:
    transformer = make_transformer()
    sizes = [
        sum(-(-t.numel() * t.element_size() // 512) * 512 for t in frozen_tensors(block))
        for block in transformer.transformer_blocks
    ]
    streamed = stream_transformer(transformer, CPU)
    assert len(set(sizes)) == 3
    assert streamed.device_bytes == 2 * max(sizes) == sum(buffer.numel() for buffer in streamed._buffers)
    assert streamed.host_bytes == sum(sizes)
    train_steps_with_all(transformer)
    for block, held in zip(transformer.transformer_blocks, [True, True, *[False] * 4], strict=True):
        for tensor in frozen_tensors(block):
            assert any(lies_in(tensor, buffer) for buffer in streamed._buffers) == held
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            assert not any(lies_in(parameter, buffer) for buffer in streamed._buffers)


def train_steps_with_all(transformer: SD3Transformer2DModel) -> None:
    checkpoint_blocks(transformer, BLOCKS)
    train_steps(transformer, steps=1)


def lies_in(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_all_weights_can_be_read_between_the_steps() -> None:
    expected = {name: p.clone() for name, p in make_transformer().named_parameters() if not p.requires_grad}
    transformer = make_transformer()
    stream_transformer(transformer, CPU)
    train_steps_with_all(transformer)
    weights = transformer.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_lora_is_saved_as_ever(tmp_path: Path) -> None:
    files = []
    for streamed in (False, True):
        transformer = make_transformer()
        if streamed:
            stream_transformer(transformer, CPU)
        train_steps_with_all(transformer)
        (tmp_path / str(streamed)).mkdir()
        files.append(load_file(save_lora(tmp_path / str(streamed), transformer, 2, 2.0, {})))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_the_blocks_own_memory_is_given_back() -> None:
    """Beside the buffers nothing holds the weights as they were loaded."""
    transformer = make_transformer()
    loaded = [weakref.ref(t.untyped_storage()) for b in transformer.transformer_blocks for t in frozen_tensors(b)]
    stream_transformer(transformer, CPU)
    gc.collect()
    assert not any(reference() is not None for reference in loaded)


def test_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages of each buffer are pinned, once; and unpinned when the source is gone, after the copies are through."""
    calls: list[tuple[Any, ...]] = []

    class Cudart:
        error = 0

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("pin", address, size))
            return Cudart.error if len(calls) == 3 else 0

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unpin", address))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append(("synchronize",)))
    source: Any = PinnedBlocks(list(make_transformer().transformer_blocks), GPU)
    pinned = [("pin", buffer.data_ptr(), -(-buffer.numel() // 4096) * 4096) for buffer in source._buffers]
    assert calls == pinned
    for buffer, (_, address, size) in zip(source._buffers, pinned, strict=True):
        room = buffer.untyped_storage()
        assert address % 4096 == 0
        assert room.data_ptr() <= address < address + size <= room.data_ptr() + room.nbytes()
    del source
    assert calls == [*pinned, ("synchronize",), *(("unpin", address) for _, address, _ in pinned)]

    calls.clear()
    Cudart.error = 2
    with pytest.raises(UserError, match=r"^the driver did not pin 0\.0 GiB of host memory .* \(CUDA error 2\): "):
        PinnedBlocks(list(make_transformer().transformer_blocks), GPU)
    gc.collect()
    assert [name for name, *_ in calls] == ["pin", "pin", "pin", "synchronize", "unpin", "unpin"]


# On a GPU


def peak_mib(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1024**2


@needs_gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("offload", [False, True], ids=["kept inputs", "offloaded inputs"])
@pytest.mark.parametrize("count", [4, 5, 6])
def test_a_gpu_trains_the_same(count: int, offload: bool) -> None:
    words: dict[str, Any] = {"dropout": 0.3, "dtype": torch.float16}
    plain = train_steps(make_transformer(**words).to(GPU), GPU, steps=5, dtype=torch.float16)
    transformer = make_transformer(**words)
    stream_transformer(transformer, GPU)
    checkpoint_blocks(transformer, count, offload)
    assert train_steps(transformer, GPU, steps=5, dtype=torch.float16).is_equal(plain)


@needs_gpu
@pytest.mark.parametrize("make", [make_transformer, lambda: make_nf4(GPU, torch.float16)], ids=["plain", "nf4"])
def test_what_is_on_the_gpu_from_the_start(make: Callable[[], SD3Transformer2DModel]) -> None:
    """All but the blocks' frozen tensors; and the parameters are still those that an optimizer was given."""
    transformer = make()
    parameters = list(transformer.parameters())
    stream_transformer(transformer, GPU)
    visiting = {id(t) for block in transformer.transformer_blocks for t in frozen_tensors(block)}
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        assert tensor.is_cuda == (id(tensor) not in visiting)
        if hasattr(tensor, "quant_state"):
            assert tensor.quant_state.absmax.is_cuda
    assert all(map(is_same, transformer.parameters(), parameters))


def is_same(first: object, second: object) -> bool:
    return first is second


@needs_gpu
def test_a_gpu_draws_the_same() -> None:
    plain = draw(make_transformer().to(GPU), 5, GPU)
    transformer = make_transformer()
    stream_transformer(transformer, GPU)
    assert all(map(torch.equal, draw(transformer, 5, GPU), plain))


@needs_gpu
@pytest.mark.usefixtures("deterministic")
def test_a_gpu_streams_nf4() -> None:
    plain = train_steps(make_nf4(GPU, torch.float16).to(GPU), GPU, dtype=torch.float16)
    transformer = make_nf4(GPU, torch.float16)
    stream_transformer(transformer, GPU)
    checkpoint_blocks(transformer, BLOCKS)
    assert transformer.transformer_blocks[3].ff.net[2].weight.device == CPU
    assert train_steps(transformer, GPU, dtype=torch.float16).is_equal(plain)


@needs_gpu
def test_large_blocks_that_copy_slower_than_they_compute() -> None:
    """32 MiB a block and a single row: a missing wait would read what is not there yet, or is there no more."""

    def make() -> torch.nn.ModuleList:
        torch.manual_seed(0)
        blocks = [torch.nn.Linear(2896, 2896, bias=False).requires_grad_(False) for _ in range(12)]
        return torch.nn.ModuleList(blocks)

    def run(blocks: torch.nn.ModuleList) -> list[torch.Tensor]:
        made = []
        for seed in range(4):
            row = torch.randn(1, 2896, generator=torch.Generator().manual_seed(seed)).to(GPU).requires_grad_()
            hidden = row
            for block in blocks:
                hidden = torch.utils.checkpoint.checkpoint(lambda x, b=block: b(x).tanh(), hidden, use_reentrant=False)
            hidden.sum().backward()
            made += [hidden.detach().cpu(), row.grad.cpu()]
        return made

    expected = run(make().to(GPU))
    blocks = make()
    streamed = StreamedBlocks(blocks, GPU)
    assert all(map(torch.equal, run(blocks), expected))
    assert streamed.copies == 12 + 10 + 3 * 20


@needs_gpu
def test_the_peak_is_below_that_of_resident_blocks() -> None:
    def make() -> SD3Transformer2DModel:
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            num_layers=12,
            num_attention_heads=8,
            caption_projection_dim=512,
            joint_attention_dim=64,
            pooled_projection_dim=64,
        )
        attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.0, seed=0)
        checkpoint_blocks(transformer, 12, offload_inputs=True)
        return transformer

    def step(transformer: SD3Transformer2DModel) -> None:
        transformer(
            hidden_states=torch.randn(1, 16, 32, 32, device=GPU),
            timestep=torch.tensor([500.0], device=GPU),
            encoder_hidden_states=torch.randn(1, 77, 64, device=GPU),
            pooled_projections=torch.randn(1, 64, device=GPU),
        ).sample.square().mean().backward()

    train_steps(make_transformer().to(GPU), GPU, steps=1)  # cuBLAS takes its workspaces
    gc.collect()
    before = torch.cuda.memory_allocated() / 1024**2
    transformer = make()
    streamed = stream_transformer(transformer, GPU)
    streamed_mib = peak_mib(lambda: step(transformer)) - before
    saved_mib = (streamed.host_bytes - streamed.device_bytes) / 1024**2
    transformer = streamed = None  # type: ignore[assignment]
    gc.collect()
    before = torch.cuda.memory_allocated() / 1024**2
    transformer = make().to(GPU)
    resident_mib = peak_mib(lambda: step(transformer)) - before
    assert resident_mib - streamed_mib == pytest.approx(saved_mib, rel=0.1)


@needs_gpu
def test_host_memory_is_pinned_to_the_byte() -> None:
    blocks = make_transformer().transformer_blocks
    source = PinnedBlocks(list(blocks), GPU)
    assert all(buffer.is_pinned() for buffer in source._buffers)
    assert sum(source.sizes) == StreamedBlocks(blocks, GPU, source).host_bytes
    assert sd3_lora.streaming.layout(frozen_tensors(blocks[0]))[-1] == source.sizes[0]
