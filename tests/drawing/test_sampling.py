"""Sampling with a transformer that is being trained: it draws, and training goes on as if it had not; and with one that
was loaded to draw, captured or compiled.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import sd3_lora.transformer.streaming
from sd3_lora.drawing.sampling import Sampler, SamplingSettings, SkipLayerGuidance, TransformerCall
from sd3_lora.transformer.compiled import Compiled, blocks_were_compiled, compile_blocks
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import stream_transformer
from sd3_lora.transformer.velocity import VelocityModel, left_as_found

import pytest
import torch
from diffusers import SD3Transformer2DModel
from fake_cuda import FakeCuda
from small_transformer import CPU, GPU, WIDTH, Trained, inputs, make_transformer, needs_gpu, train_steps

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


# Captured and compiled

SKIPPING = replace(SETTINGS, num_steps=6, skip_layers=SkipLayerGuidance((1, 2), start=0.0, stop=0.5))


def to_draw(device: torch.device = CPU, streamed: bool = False) -> SD3Transformer2DModel:
    dtype = torch.float16 if device == GPU else torch.float32
    transformer = make_transformer(dtype=dtype).eval()
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    if streamed:
        stream_transformer(transformer, device, buffers=3)
    return transformer.to(device) if not streamed else transformer


def captured(transformer: SD3Transformer2DModel, shapes: int, **more: object) -> Sampler:
    call = TransformerCall(transformer, captures=True, must_capture=True, most_shapes=shapes, **more)
    return Sampler(transformer, SCHEDULER, call=call)


def test_each_kind_of_call_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes of a batch, each with all blocks and without some; no call of one is taken for another's."""
    transformer = to_draw()
    sampler, plain = captured(transformer, 4), Sampler(transformer, SCHEDULER)
    fake = FakeCuda(monkeypatch, sampler.call._forward)
    sampler.call.captured._compute = fake
    for pictures in (4, 2, 4, 2):  # of two pictures without blocks there are four rows, as of two under guidance
        assert torch.equal(sample(sampler, pictures, SKIPPING), sample(plain, pictures, SKIPPING))
    assert not sampler.call.captured.gave_up
    assert sorted(event for event in fake.events if event.startswith("compute")) == [
        f"compute {rows}" for rows in (2, 4, 4, 8)
    ]
    # Six steps, two of them with two calls: after the first of its kind each is a replay alone.
    assert sum(event.startswith("replay") for event in fake.events) == 4 * 8 + 4


def test_a_strength_beside_the_weights_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = to_draw()
    sampler = captured(transformer, 1)
    fake = FakeCuda(monkeypatch, sampler.call._forward)
    sampler.call.captured._compute = fake
    sample(sampler)
    sampler.call.release()
    fake.events.clear()
    sample(sampler)
    assert fake.events == ["capture 2", "replay 2", "replay 2"]


def test_graphs_do_not_keep_the_transformer() -> None:
    """The VAE is loaded into its memory, and nothing collects cycles before."""
    gc.disable()
    try:
        transformer = to_draw()
        gone, sampler = weakref.ref(transformer), captured(transformer, 1)
        del transformer, sampler
        assert gone() is None
    finally:
        gc.enable()


@needs_gpu
@pytest.mark.parametrize("streamed", [False, True])
def test_a_gpu_draws_the_same_captured(streamed: bool) -> None:
    """With a smaller last batch and with skip-layer guidance, bit for bit."""
    plain = Sampler(to_draw(GPU, streamed), SCHEDULER)
    sampler = captured(to_draw(GPU, streamed), 4)
    for pictures in (3, 3, 1, 3):
        assert torch.equal(sample(sampler, pictures, SKIPPING), sample(plain, pictures, SKIPPING))
    assert sampler.call.captured.captured
    assert not sampler.call.captured.gave_up


@needs_gpu
@pytest.mark.parametrize("captures", [False, True])
def test_a_gpu_draws_almost_the_same_compiled(captures: bool) -> None:
    plain, transformer = Sampler(to_draw(GPU), SCHEDULER), to_draw(GPU)
    compile_blocks(transformer, Compiled.ALWAYS)
    call = TransformerCall(transformer, Compiled.ALWAYS, 6, captures, captures, most_shapes=4)
    sampler = Sampler(transformer, SCHEDULER, call=call)
    for pictures in (3, 1, 3):
        drawn, expected = sample(sampler, pictures, SKIPPING).float(), sample(plain, pictures, SKIPPING).float()
        assert (drawn - expected).norm() < 0.02 * expected.norm()
        assert blocks_were_compiled()
    # The smaller batch and calls without blocks were computed as they are, bit for bit but for what came before.
    assert torch.equal(sample(sampler, 1), sample(plain, 1))
