"""Streamed pieces on a GPU: the numbers of resident ones bit for bit, however fast it computes and copies."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.transformer.base_weights import load_transformer
from sd3_lora.transformer.lora import attach_lora, target_modules
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import Piece, StreamedBlocks, pieces_of, stream_transformer

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_transformer import GPU, make_transformer, needs_gpu, train_steps
from test_streaming import draw, make_nf4
from torch.utils.checkpoint import checkpoint


def peak_mib(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1024**2


@needs_gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("count", [0, 1, 5, 6])
@pytest.mark.parametrize("make", [make_transformer, make_nf4])
@pytest.mark.parametrize(("buffers", "streamed_blocks"), [(2, None), (6, None), (3, (0, 2, 3))])
def test_a_gpu_trains_the_same(
    make: Callable[..., SD3Transformer2DModel], count: int, buffers: int, streamed_blocks: tuple[int, ...] | None
) -> None:
    words: dict[str, Any] = {"dtype": torch.float16} | ({"device": GPU} if make is make_nf4 else {"dropout": 0.3})
    plain = train_steps(make(**words).to(GPU), GPU, steps=5, dtype=torch.float16)
    for offload in [False, True] if count else [False]:
        transformer = make(**words)
        stream_transformer(transformer, GPU, None, buffers, streamed_blocks)
        recompute_blocks(transformer, range(count), offload)
        assert train_steps(transformer, GPU, steps=5, dtype=torch.float16).is_equal(plain)


@needs_gpu
@pytest.mark.parametrize("make", [make_transformer, lambda: make_nf4(GPU, torch.float16)], ids=["plain", "nf4"])
def test_what_is_on_the_gpu_from_the_start(make: Callable[[], SD3Transformer2DModel]) -> None:
    transformer = make()
    streamed = stream_transformer(transformer, GPU)
    streamed_blocks = {
        id(layer.weight) for piece in pieces_of(transformer.transformer_blocks) for layer in piece.layers
    }
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        assert tensor.is_cuda == (id(tensor) not in streamed_blocks)
        if hasattr(tensor, "quant_state"):
            assert tensor.quant_state.absmax.is_cuda
    assert all(slot.buffer.is_cuda for slot in streamed._slots)
    source: Any = streamed._source
    assert all(buffer.is_pinned() for buffer in source._buffers)


@needs_gpu
def test_a_gpu_draws_the_same() -> None:
    plain = draw(make_transformer().to(GPU), 5, GPU)
    transformer = make_transformer()
    stream_transformer(transformer, GPU)
    assert all(map(torch.equal, draw(transformer, 5, GPU), plain))


@needs_gpu
def test_4_bit_weights_are_the_same_numbers_wherever_they_are() -> None:
    files = ModelFiles(ModelConfig(str(MINIATURE)))
    words = {
        "hidden_states": torch.randn(1, 16, 8, 8, device=GPU, dtype=torch.float16),
        "timestep": torch.tensor([500.0], device=GPU),
        "encoder_hidden_states": torch.randn(1, 9, 256, device=GPU, dtype=torch.float16),
        "pooled_projections": torch.randn(1, 192, device=GPU, dtype=torch.float16),
    }
    found = []
    for streamed_blocks in ((), (1, 4), range(6)):
        transformer = load_transformer(files, GPU, torch.float16, "nf4", streamed_blocks=streamed_blocks)
        if streamed_blocks:
            stream_transformer(transformer, GPU, streamed_blocks=streamed_blocks)
        with torch.no_grad():
            found.append(transformer(**words).sample)
    assert all(torch.equal(velocity, found[0]) for velocity in found)


@needs_gpu
@pytest.mark.parametrize("recomputed", [False, True])
def test_large_pieces_that_copy_slower_than_they_compute(recomputed: bool) -> None:
    """32 MiB a piece and a single row: a missing wait would read what is not there yet, or is there no more."""

    def make() -> list[torch.nn.Linear]:
        torch.manual_seed(0)
        return [torch.nn.Linear(2896, 2896, bias=False).requires_grad_(False) for _ in range(12)]

    def run(layers: list[torch.nn.Linear], begin_pass: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
        made = []
        for seed in range(4):
            row = torch.randn(1, 2896, generator=torch.Generator().manual_seed(seed)).to(GPU).requires_grad_()
            hidden = row
            begin_pass()
            for layer in layers:
                multiply = partial(lambda layer, x: layer(x).tanh(), layer)
                hidden = checkpoint(multiply, hidden, use_reentrant=False) if recomputed else multiply(hidden)
            hidden.sum().backward()
            made += [hidden.detach().cpu(), row.grad.cpu()]
        return made

    expected = run([layer.to(GPU) for layer in make()])
    layers = make()
    streamed = StreamedBlocks([Piece((str(index),), (layer,)) for index, layer in enumerate(layers)], GPU)
    assert all(map(torch.equal, run(layers, streamed.begin_pass), expected))
    # The first forward's end copies the first piece again, for nothing; then backward and forward meet twice a pass.
    assert streamed.copies == 12 + 1 + 11 + 3 * 20


@needs_gpu
@pytest.mark.parametrize("count", [0, 12])
def test_the_peak_is_below_that_of_resident_blocks(count: int) -> None:
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
        recompute_blocks(transformer, range(count), offload_inputs=count > 0)
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
    source: Any = streamed._source
    saved_mib = (sum(source.sizes) - streamed.device_bytes) / 1024**2
    transformer = streamed = None  # type: ignore[assignment]
    gc.collect()
    before = torch.cuda.memory_allocated() / 1024**2
    transformer = make().to(GPU)
    resident_mib = peak_mib(lambda: step(transformer)) - before
    assert resident_mib - streamed_mib == pytest.approx(saved_mib, rel=0.1)
