"""LoRAs merged into a loaded transformer: rounded once, and gone without a trace."""

from __future__ import annotations

from pathlib import Path

from sd3_lora.transformer.lora_files import LoraFile, read_lora_file
from sd3_lora.transformer.merged_weights import MergedLoras
from sd3_lora.transformer.streaming import PinnedPieces, pieces_of, stream_transformer

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from small_transformer import CPU, GPU, inputs, needs_gpu, smaller_transformer

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "context_embedder")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A transformer's folder, in float16."""
    torch.manual_seed(0)
    transformer = smaller_transformer(
        num_layers=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(),
    )
    transformer.half().save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def load(base: Path, dtype: torch.dtype = torch.float16) -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel.from_pretrained(base)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data = tensor.data.to(dtype)
    return transformer.requires_grad_(False).eval()


def lora(base: Path, seed: int, bias: bool = False, dora: bool = False) -> LoraFile:
    transformer, generator = load(base), torch.Generator().manual_seed(seed)
    tensors = {}
    for name in LAYERS:
        rows, columns = transformer.get_submodule(name).weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) / 20
        if bias:
            tensors[f"transformer.{name}.lora_B.bias"] = torch.randn(rows, generator=generator)
        if dora:
            tensors[f"transformer.{name}.lora_magnitude_vector"] = torch.rand(rows, generator=generator)
    path = base / f"lora{seed}{bias}{dora}.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return read_lora_file(path, SD3Transformer2DModel.load_config(base))


def merged(transformer: SD3Transformer2DModel, loras: list[LoraFile], base: Path, **more: object) -> MergedLoras:
    return MergedLoras(transformer, loras, [base / "diffusion_pytorch_model.safetensors"], CPU, **more)


def is_equal(transformer: SD3Transformer2DModel, other: SD3Transformer2DModel) -> bool:
    mine, theirs = transformer.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_loras_are_added_in_float32_and_rounded_once(base: Path, dtype: torch.dtype) -> None:
    transformer, loras = load(base, dtype), [lora(base, 1, bias=True), lora(base, 2)]
    stored = load(base).state_dict()
    for scales in ((0.5, -1.0), (1.0, 0.25)):  # the second from weights that were merged before
        merging = merged(transformer, loras, base)
        merging.use((1.0, 1.0))
        merging.use(scales)
        for name in LAYERS:
            starts = [each.start(name) for each in loras]
            expected = stored[f"{name}.weight"].float()
            for one, scale in zip(starts, scales, strict=True):
                expected = expected + scale * (one.up @ one.down)
            layer = transformer.get_submodule(name)
            assert torch.equal(layer.weight, expected.to(dtype))
            assert not torch.equal(layer.weight, stored[f"{name}.weight"].to(dtype))
            assert torch.equal(layer.bias, (stored[f"{name}.bias"].float() + scales[0] * starts[0].bias).to(dtype))
        merging.use(None)
        assert is_equal(transformer, load(base, dtype))


def test_no_strength_leaves_a_trace_of_another(base: Path) -> None:
    first, second, one = load(base), load(base), lora(base, 1)
    merging = merged(first, [one], base)
    for scale in (1.0, 0.0, 0.5):
        merging.use((scale,))
        if not scale:
            assert is_equal(first, load(base))
    merged(second, [one], base).use((0.5,))
    assert is_equal(first, second)


def test_it_draws_as_the_adapter_does(base: Path) -> None:
    """A DoRA too, whose norms are of the merged weight."""
    for dora in (False, True):
        beside, transformer, one = load(base, torch.float32), load(base, torch.float32), lora(base, 1, dora=dora)
        one.attach(beside, "lora_0")
        merged(transformer, [one], base).use((1.0,))
        with torch.no_grad():
            expected, velocity = (each(**inputs(0, CPU), return_dict=False)[0] for each in (beside, transformer))
        assert torch.allclose(velocity, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(
            velocity, load(base, torch.float32)(**inputs(0, CPU), return_dict=False)[0], atol=0.01
        )


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)])
def test_streamed_matrices_change_on_the_host_and_are_copied_anew(base: Path, device: torch.device) -> None:
    """What the buffers still hold when the strength changes is not computed with."""
    dtype = torch.float32 if device == CPU else torch.float16
    resident, transformer, one = load(base, dtype).to(device), load(base, dtype), lora(base, 1)
    pieces = pieces_of(transformer.transformer_blocks)
    streamed = stream_transformer(transformer, device, PinnedPieces(pieces, device), buffers=len(pieces))
    merging = MergedLoras(transformer, [one], [base / "diffusion_pytorch_model.safetensors"], device, streamed.forget)
    plain = MergedLoras(resident, [one], [base / "diffusion_pytorch_model.safetensors"], device)
    seen = []
    with torch.no_grad():
        for scale in (1.0, 0.5, 0.0):
            merging.use((scale,))
            plain.use((scale,))
            seen.append(transformer(**inputs(0, device, dtype), return_dict=False)[0])
            assert torch.equal(seen[-1], resident(**inputs(0, device, dtype), return_dict=False)[0])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
