"""Sampling with a transformer that is being trained: it draws, and training goes on as if it had not."""

from __future__ import annotations

from dataclasses import replace

import sd3_lora.transformer.streaming
from sd3_lora.drawing.sampling import Sampler, SamplingSettings, SkipLayerGuidance, left_as_found
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import stream_transformer
from sd3_lora.transformer.velocity import VelocityModel

import pytest
import torch
from small_transformer import CPU, WIDTH, Trained, inputs, make_transformer, train_steps

SCHEDULER = {"shift": 3.0, "num_train_timesteps": 1000}
SETTINGS = SamplingSettings(num_steps=2, guidance=3.0)


def embeddings() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(5, WIDTH, generator=generator), torch.randn(8, generator=generator))
        for name in ("a dog", "")
    }


def sample(sampler: Sampler, pictures: int = 1, settings: SamplingSettings = SETTINGS) -> torch.Tensor:
    noise = torch.randn(pictures, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    return sampler.denoise(noise, ["a dog"] * pictures, embeddings(), settings)


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


def test_a_live_model_in_bfloat16_draws_as_one_that_was_loaded_to_draw() -> None:
    """Its LoRA is float32 beside a bfloat16 base. While it draws it has the base's dtype, and then its memory again."""
    transformer = make_transformer(dtype=torch.bfloat16)
    flat = flatten_parameters([p for n, p in transformer.named_parameters() if "lora_" in n])
    trained = {n: p for n, p in transformer.named_parameters() if "lora_" in n}
    places, bits = {n: (p.data_ptr(), p.grad.data_ptr()) for n, p in trained.items()}, flat.detach().clone()
    drawn = sample(Sampler.of_live(VelocityModel(transformer, torch.bfloat16), SCHEDULER), pictures=2)
    assert {n: (p.data_ptr(), p.grad.data_ptr()) for n, p in trained.items()} == places
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(flat, bits)
    with pytest.raises(RuntimeError, match="dtype"):
        sample(Sampler(transformer, SCHEDULER))
    for parameter in trained.values():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(drawn, sample(Sampler(transformer, SCHEDULER), pictures=2))


@pytest.mark.parametrize("skips", [False, True])
def test_both_prompts_one_after_the_other_take_half_the_rows(skips: bool) -> None:
    transformer, rows = make_transformer(), []
    transformer.register_forward_pre_hook(
        lambda _, __, words: rows.append(len(words["hidden_states"])), with_kwargs=True
    )
    settings = replace(SETTINGS, num_steps=8, skip_layers=SkipLayerGuidance((1,)) if skips else None)
    together = sample(Sampler(transformer, SCHEDULER), 2, settings)
    assert set(rows) == ({4, 2} if skips else {4})
    rows.clear()
    apart = sample(Sampler(transformer, SCHEDULER), 2, replace(settings, apart=True))
    assert set(rows) == {2}
    assert torch.allclose(apart, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("buffers", [2, 6, 40])
def test_a_streamed_model_draws_right_before_and_after_the_replay_of_a_captured_step(
    monkeypatch: pytest.MonkeyPatch, buffers: int
) -> None:
    """What a replay leaves in the buffers is not what was noted there while it was captured."""
    transformer = make_transformer()
    expected = sample(Sampler(transformer, SCHEDULER))
    streamed = stream_transformer(transformer, CPU, buffers=buffers)
    recompute_blocks(transformer, range(3))
    sampler = Sampler.of_live(VelocityModel(transformer, torch.float32), SCHEDULER)
    with monkeypatch.context() as patch:
        patch.setattr(sd3_lora.transformer.streaming, "_is_capturing", lambda _: True)
        transformer(**inputs(0, CPU)).sample.square().mean().backward()
    for _ in range(2):
        assert torch.equal(sample(sampler), expected)
        for slot in streamed._slots:  # a replay
            slot.buffer.fill_(7)


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
