"""Sampling with a transformer that is being trained: it draws, and training goes on as if it had not."""

from __future__ import annotations

from sd3_lora.drawing.sampling import Sampler, SamplingSettings, left_as_found
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import stream_transformer
from sd3_lora.transformer.velocity import VelocityModel

import pytest
import torch
from small_transformer import CPU, WIDTH, Trained, make_transformer, train_steps

SCHEDULER = {"shift": 3.0, "num_train_timesteps": 1000}
SETTINGS = SamplingSettings(num_steps=2, guidance=3.0)


def embeddings() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(5, WIDTH, generator=generator), torch.randn(8, generator=generator))
        for name in ("a dog", "")
    }


def sample(sampler: Sampler, pictures: int = 1) -> torch.Tensor:
    noise = torch.randn(pictures, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    return sampler.denoise(noise, ["a dog"] * pictures, embeddings(), SETTINGS)


def arranged(streamed: bool, dropout: float = 0.3) -> VelocityModel:
    transformer = make_transformer(dropout=dropout)
    if streamed:
        stream_transformer(transformer, CPU, buffers=2)
    recompute_blocks(transformer, range(3))
    return VelocityModel(transformer, torch.float32)


@pytest.mark.parametrize("streamed", [False, True])
def test_training_goes_on_as_if_nothing_had_been_drawn(streamed: bool) -> None:
    """With dropout, whose draws come from torch's own generator; each step's loss and gradients, bit for bit."""

    def train(draws: bool) -> Trained:
        model = arranged(streamed)
        sampler = Sampler.of_live(model, SCHEDULER)

        def between(step: int) -> None:
            if draws and step:
                sample(sampler)

        trained = train_steps(model.transformer, steps=3, between=between)
        assert model.transformer.training
        assert all(not module._forward_pre_hooks or streamed for module in [model.transformer])
        return trained

    assert train(draws=True).is_equal(train(draws=False))


def test_a_live_model_draws_without_dropout_and_with_its_lora() -> None:
    model = arranged(streamed=False)
    drawn = sample(Sampler.of_live(model, SCHEDULER))
    assert torch.equal(drawn, sample(Sampler.of_live(model, SCHEDULER)))
    assert torch.equal(drawn, sample(Sampler(arranged(False, dropout=0.0).transformer, SCHEDULER)))
    model.transformer.disable_lora()
    assert not torch.allclose(drawn, sample(Sampler.of_live(model, SCHEDULER)))


def test_a_live_model_in_bfloat16_draws_in_its_precision() -> None:
    """Its LoRA is float32 beside a bfloat16 base, which no call outside of autocast can multiply."""
    transformer = make_transformer(dtype=torch.bfloat16)
    assert {p.dtype for n, p in transformer.named_parameters() if "lora_" in n} == {torch.float32}
    drawn = sample(Sampler.of_live(VelocityModel(transformer, torch.bfloat16), SCHEDULER), pictures=2)
    assert drawn.shape == (2, 4, 8, 8)
    with pytest.raises(RuntimeError, match="dtype"):
        sample(Sampler(transformer, SCHEDULER))


def test_the_mode_and_the_generators_are_put_back_after_an_error() -> None:
    transformer = make_transformer().train()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)

    def fail() -> None:
        with left_as_found(transformer):
            assert not transformer.training
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert transformer.training
    assert torch.equal(torch.rand(2), expected)
