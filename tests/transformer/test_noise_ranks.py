"""T-LoRA: which ranks count, row by row, in training and in drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import LoraKind, attach_lora, lora_layers, save_lora, target_modules
from sd3_lora.transformer.lora_files import read_lora_file, require_drawable, require_start
from sd3_lora.transformer.noise_ranks import NoiseRanks
from sd3_lora.transformer.recompute import recompute_blocks

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_transformer import GPU, needs_gpu
from test_lora import load_transformer

KIND = LoraKind(least_rank=2, ranks={"attn.to_k": 1, "to_v": 9})


@pytest.fixture
def transformer(tiny_sd3: Path) -> SD3Transformer2DModel:
    """With a T-LoRA of rank 4, 1 and 9, as if it had been trained."""
    return attached(load_transformer(tiny_sd3), KIND)


def attached(transformer: SD3Transformer2DModel, kind: LoraKind) -> SD3Transformer2DModel:
    attach_lora(transformer, target_modules(transformer, None, None), 4, 8.0, 0.0, 0, kind)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return transformer


def output(transformer: SD3Transformer2DModel, timesteps: list[float], with_gradient: bool = False) -> torch.Tensor:
    """Each row has the same inputs."""
    generator, size = torch.Generator().manual_seed(2), len(timesteps)
    with torch.set_grad_enabled(with_gradient):
        return transformer(
            hidden_states=torch.randn(1, 16, 8, 8, generator=generator).expand(size, -1, -1, -1),
            timestep=torch.tensor(timesteps),
            encoder_hidden_states=torch.randn(1, 97, 48, generator=generator).expand(size, -1, -1),
            pooled_projections=torch.randn(1, 24, generator=generator).expand(size, -1),
        ).sample


def cut(transformer: SD3Transformer2DModel, kept: dict[int, int]) -> None:
    """Leaves so many of the first ranks, by rank."""
    for layer in lora_layers(transformer).values():
        down = layer.lora_A["default"].weight.data
        down[kept[len(down)] :] = 0


@pytest.mark.parametrize(
    ("timestep", "kept"),
    [
        (1000.0, {4: 2, 1: 1, 9: 2}),  # noise alone
        (999.0, {4: 2, 1: 1, 9: 2}),
        (500.0, {4: 3, 1: 1, 9: 5}),  # floor(7 / 2) + 2
        (400.0, {4: 3, 1: 1, 9: 6}),  # floor(7 × 0.6) + 2
        (0.0, {4: 4, 1: 1, 9: 9}),  # no noise
    ],
)
def test_the_ranks_of_a_timestep(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, timestep: float, kept: dict[int, int]
) -> None:
    """It is the plain LoRA of these ranks alone; so is each row of a batch, whatever the others."""
    plain = attached(load_transformer(tiny_sd3), LoraKind(ranks=KIND.ranks))
    whole = output(plain, [timestep])
    cut(plain, kept)
    expected = output(plain, [timestep])
    if timestep:
        assert (whole - expected).abs().max() > 1e-3
    torch.testing.assert_close(output(transformer, [timestep]), expected, atol=1e-6, rtol=1e-5)
    rows = output(transformer, [1000.0, timestep, 30.0])
    torch.testing.assert_close(rows[1:2], expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_count_has_no_gradient(transformer: SD3Transformer2DModel) -> None:
    """And recomputed blocks give the same gradients, bit for bit."""
    gradients = []
    for recomputed in ([], [0, 1]):
        recompute_blocks(transformer.train(), recomputed)
        for parameter in transformer.parameters():
            parameter.grad = None
        output(transformer, [1000.0, 990.0], with_gradient=True).square().mean().backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    for layer in lora_layers(transformer).values():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if not down.grad[:2].any():  # the last block's text asks for nothing
            assert layer is transformer.transformer_blocks[1].attn.add_q_proj
        assert not down.grad[2:].any()
        assert not up.grad[:, 2:].any()


def test_layers_of_two_dimensions() -> None:
    """A LoRA on a modulation has no tokens."""
    ranks, model = NoiseRanks(1), torch.nn.Identity()
    model.forward = lambda timestep: timestep  # type: ignore[method-assign]
    ranks.follow(model, {4})  # type: ignore[arg-type]
    model(timestep=torch.tensor([1000.0, 0.0]))
    assert ranks(torch.ones(2, 4), 4).tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert ranks(torch.ones(2, 3, 8), 4)[:, :, :4].sum(2).tolist() == [[1, 1, 1], [4, 4, 4]]


def test_a_compiled_layer_is_one_graph(transformer: SD3Transformer2DModel) -> None:
    layer = transformer.get_submodule("transformer_blocks.0.attn.to_q")
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for timesteps in ([1000.0, 0.0], [0.0, 1000.0]):
        output(transformer, timesteps)
        torch.testing.assert_close(compiled(states), layer(states))


@needs_gpu
def test_a_captured_step_is_the_step_bit_for_bit(tiny_sd3: Path) -> None:
    """With other timesteps in each replay."""
    losses = []
    for is_captured in (False, True):
        transformer = attached(load_transformer(tiny_sd3).to(GPU), KIND)
        flat = flatten_parameters([parameter for parameter in transformer.parameters() if parameter.requires_grad])
        assert flat.grad is not None

        def step(states: torch.Tensor, timesteps: torch.Tensor, model: Any = transformer) -> torch.Tensor:
            text = states.new_ones(2, 97, 48)
            loss = model(states, text, text[:, 0, :24], timesteps).sample.square().mean()
            loss.backward()
            return loss.detach()

        call = CapturedCall(step, GPU, [flat.grad], asked=True) if is_captured else step
        torch.manual_seed(0)
        states = torch.randn(2, 16, 8, 8, device=GPU)
        for timesteps in ([900.0, 100.0], [100.0, 900.0], [500.0, 1000.0], [1.0, 2.0]):
            losses.append((is_captured, call(states, torch.tensor(timesteps, device=GPU)).item()))
            flat.data -= 0.01 * flat.grad
            flat.grad.zero_()
    assert [loss for captured, loss in losses if captured] == [loss for captured, loss in losses if not captured]


# The file


def test_it_is_drawn_as_trained(tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    path = save_lora(tmp_path, transformer, {})
    drawing = load_transformer(tiny_sd3)
    lora = read_lora_file(path, drawing.config)
    assert lora.least_rank == 2
    lora.attach(drawing, "subject")
    drawing.set_adapters(["subject"], [1.0])
    timesteps = [1000.0, 500.0, 0.0]
    expected = output(transformer, timesteps)
    torch.testing.assert_close(output(drawing, timesteps), expected, atol=1e-5, rtol=1e-5)
    stock = load_transformer(tiny_sd3)
    stock.load_lora_adapter(str(tmp_path), weight_name=path.name)  # another program: all ranks, whatever the noise
    difference = (output(stock, timesteps) - expected).abs().flatten(1).amax(1)
    assert difference[0] > 1e-3
    assert difference[2] < 1e-5


def test_it_is_alone(transformer: SD3Transformer2DModel, tiny_sd3: Path, tmp_path: Path) -> None:
    lora = read_lora_file(save_lora(tmp_path, transformer, {}), transformer.config)
    require_drawable([lora], [0.5], is_streamed=True)
    with pytest.raises(UserError, match="is a T-LoRA, which is not drawn with other LoRAs: give one --lora alone"):
        require_drawable([lora, lora], [1.0, 1.0], is_streamed=False)
    ranks = dict.fromkeys(lora.layers, 9)
    require_start(lora, ranks, LoraKind(least_rank=2))
    with pytest.raises(UserError, match=r"of which 2 ranks count in noise alone: type --use_tlora --tlora_min_rank 2$"):
        require_start(lora, ranks, LoraKind(least_rank=3))
    (tmp_path / "plain").mkdir()
    plain = attached(load_transformer(tiny_sd3), LoraKind())
    other = read_lora_file(save_lora(tmp_path / "plain", plain, {}), plain.config)
    with pytest.raises(UserError, match="is no T-LoRA: leave out --use_tlora"):
        require_start(other, ranks, LoraKind(least_rank=3))
