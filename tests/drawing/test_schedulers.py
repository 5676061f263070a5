"""Every scheduler draws the stock pipeline's picture and comes near the exact one; so does skip-layer guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.drawing.config import SCHEDULERS, SchedulerName
from sd3_lora.drawing.sampling import Sampler, SamplingSettings, SkipLayerGuidance
from sd3_lora.drawing.schedulers import make_scheduler, set_noise_levels

import diffusers
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from small_transformer import CPU, WIDTH, make_transformer

CONFIG = {"shift": 3.0, "num_train_timesteps": 1000}
NAMES = list(SCHEDULERS)
LAYERS = (1, 3)


def embeddings() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(5, WIDTH, generator=generator), torch.randn(8, generator=generator))
        for name in ("a dog", "a cat", "blurry")
    }


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))


def sample(transformer: SD3Transformer2DModel, settings: SamplingSettings) -> torch.Tensor:
    return Sampler(transformer, CONFIG).denoise(noise(), ["a dog", "a cat"], embeddings(), settings)


def stock(transformer: SD3Transformer2DModel, scheduler: Any, **more: Any) -> torch.Tensor:
    """The same by diffusers' pipeline."""
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    parts |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    pipeline = StableDiffusion3Pipeline(transformer=transformer.eval(), scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    known, scale = embeddings(), pipeline.vae_scale_factor
    prompts, negative = (
        [torch.stack(part) for part in zip(*(known[name] for name in names), strict=True)]
        for names in (("a dog", "a cat"), ("blurry", "blurry"))
    )
    return pipeline(
        prompt_embeds=prompts[0],
        pooled_prompt_embeds=prompts[1],
        negative_prompt_embeds=negative[0],
        negative_pooled_prompt_embeds=negative[1],
        latents=noise(),
        height=8 * scale,
        width=8 * scale,
        output_type="latent",
        **more,
    ).images


def stock_scheduler(name: SchedulerName, shift: float) -> Any:
    """As diffusers' documentation makes it for a model of flow matching."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
    }[name]()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_latents_are_the_stock_pipelines(name: SchedulerName, guidance: float) -> None:
    transformer = make_transformer()
    drawn = sample(transformer, SamplingSettings(4, guidance, "blurry", name))
    expected = stock(transformer, stock_scheduler(name, 3.0), num_inference_steps=4, guidance_scale=guidance)
    assert torch.equal(drawn, expected)
    if name != "euler":
        assert not torch.allclose(drawn, sample(transformer, SamplingSettings(4, guidance, "blurry")))


@pytest.mark.parametrize("name", NAMES)
def test_the_shift_is_the_stock_schedulers(name: SchedulerName) -> None:
    transformer = make_transformer()
    drawn = sample(transformer, SamplingSettings(3, 4.0, "blurry", name, timestep_shift=6.0))
    expected = stock(transformer, stock_scheduler(name, 6.0), num_inference_steps=3, guidance_scale=4.0)
    assert torch.equal(drawn, expected)
    assert not torch.allclose(drawn, sample(transformer, SamplingSettings(3, 4.0, "blurry", name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_few_steps(name: SchedulerName, num_steps: int) -> None:
    assert sample(make_transformer(), SamplingSettings(num_steps, 4.0, "blurry", name)).isfinite().all()


def test_a_shift_that_gives_two_levels_one_whole_timestep() -> None:
    """The stock scheduler looks for its first step by that number, and begins with the second."""
    settings = SamplingSettings(60, 1.0, "blurry", "dpmpp_2m", timestep_shift=40.0)
    scheduler = make_scheduler("dpmpp_2m", CONFIG, 40.0)
    calls = set_noise_levels(scheduler, 60, CPU, 16)
    assert calls[0][0] == calls[1][0]
    assert sample(make_transformer(layers=2), settings).isfinite().all()


def test_a_model_whose_levels_shift_with_the_size() -> None:
    config = {**CONFIG, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    config |= {"base_shift": 0.5, "max_shift": 1.5}
    transformer = make_transformer()
    drawn = Sampler(transformer, config).denoise(
        noise(), ["a dog", "a cat"], embeddings(), SamplingSettings(3, 4.0, "blurry")
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    assert torch.equal(drawn, stock(transformer, scheduler, num_inference_steps=3, guidance_scale=4.0))
    for name, shift in (("heun", None), ("euler", 2.0)):
        with pytest.raises(UserError, match="leave both out"):
            make_scheduler(name, config, shift)  # type: ignore[arg-type]


# Against the exact solution: a mixture of three Gaussians, whose velocity has a formula.

MEANS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SPREAD = 0.3


def exact_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """`E[noise - data | x]`, where `x = (1 - σ) data + σ noise`."""
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    distance = x[:, None] - (1 - sigma) * MEANS  # (B, 3, 16)
    weights = torch.softmax(-distance.square().sum(-1) / (2 * variance), dim=1)[..., None]
    data = (weights * (MEANS + (1 - sigma) * SPREAD**2 / variance * distance)).sum(1)
    return (x - data) / sigma


def solve(scheduler: Any, num_steps: int) -> torch.Tensor:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for timestep, _ in set_noise_levels(scheduler, num_steps, CPU, 16):
        velocity = exact_velocity(x.double(), float(timestep) / 1000).float()
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    return x


def test_the_named_schedulers_come_nearer_than_euler_and_the_others_do_not() -> None:
    """With the same number of calls; the reasons why some of diffusers' are here and others are not."""
    exact = solve(make_scheduler("heun", CONFIG), 400)

    def error(scheduler: Any, num_steps: int) -> float:
        return (solve(scheduler, num_steps) - exact).square().mean().sqrt().item()

    errors = {name: error(make_scheduler(name, CONFIG), 14 if name == "heun" else 28) for name in NAMES}
    assert all(errors[name] < 0.6 * errors["euler"] for name in NAMES if name != "euler"), errors
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    left_out: dict[str, Callable[[], Any]] = {
        "DEIS": lambda: diffusers.DEISMultistepScheduler(**flow),
        "single step": lambda: diffusers.DPMSolverSinglestepScheduler(**flow),
        "SA": lambda: diffusers.SASolverScheduler(**flow),
        "LCM": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
    }
    best = max(errors[name] for name in NAMES if name != "euler")
    for name, make in left_out.items():
        assert error(make(), 28) > best, name


# Skip-layer guidance


def test_skip_layer_guidance_is_the_stock_pipelines() -> None:
    transformer = make_transformer()
    skipping = SkipLayerGuidance(LAYERS, scale=2.0, start=0.1, stop=0.6)
    drawn = sample(transformer, SamplingSettings(6, 4.0, "blurry", skip_layers=skipping))
    expected = stock(
        transformer,
        stock_scheduler("euler", 3.0),
        num_inference_steps=6,
        guidance_scale=4.0,
        skip_guidance_layers=list(LAYERS),
        skip_layer_guidance_scale=2.0,
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.6,
    )
    assert torch.equal(drawn, expected)
    assert not torch.allclose(drawn, sample(transformer, SamplingSettings(6, 4.0, "blurry")))


@pytest.mark.parametrize("name", NAMES)
def test_a_noise_level_is_guided_in_every_call_or_in_none(name: SchedulerName) -> None:
    """Heun's second call of a step is at the level of the next one's first, and follows the same velocity."""
    transformer = make_transformer()
    skipping, calls = SkipLayerGuidance(LAYERS, start=0.1, stop=0.6), []
    forward = transformer.forward

    def watched(**words: Any) -> Any:
        calls.append((float(words["timestep"][0]), words["skip_layers"]))
        return forward(**words)

    transformer.forward = watched  # type: ignore[method-assign]
    sample(transformer, SamplingSettings(6, 4.0, "blurry", name, skip_layers=skipping))
    levels = list(dict.fromkeys(timestep for timestep, _ in calls))
    skipped = [timestep for timestep, layers in calls if layers == list(LAYERS)]
    times = 2 if name == "heun" else 1
    assert skipped == [level for level in levels[1:4] for _ in range(times)]
    assert len(levels) == 6
