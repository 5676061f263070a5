"""The formulas of rectified flow, against diffusers' own on the same inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sd3_lora.training.flow import NoiseTable, flow_matching_loss, interpolate, load_noise_table
from sd3_lora.training.flow import sample_table_indices as sample_indices
from sd3_lora.training.flow_flags import FlowConfig

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

SCHEMES = ("logit_normal", "sigma_sqrt", "mode", "cosmap", "none")
SHAPE = (64, 16, 4, 4)


@pytest.fixture
def scheduler_config() -> dict[str, Any]:
    """SD3's own: shift 3."""
    return dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)


@pytest.fixture
def table(scheduler_config: dict[str, Any]) -> NoiseTable:
    return load_noise_table(scheduler_config, None)


def shifted(shift: float) -> torch.Tensor:
    """The paper's equation 23 on 1, 0.999, …, 0.001."""
    sigmas = torch.linspace(1.0, 0.001, 1000, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def test_the_table_is_the_schedulers(table: NoiseTable) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(table.sigmas, scheduler.sigmas)
    assert torch.equal(table.timesteps, scheduler.timesteps)
    assert table.sigmas.dtype == table.timesteps.dtype == torch.float32
    assert table.sigmas.shape == table.timesteps.shape == (1000,)
    assert table.sigmas[0] == 1.0
    assert table.sigmas.min() > 0
    torch.testing.assert_close(table.sigmas.double(), shifted(3.0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(table.timesteps, 1000 * table.sigmas)


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0, 6.0])
def test_timestep_shift_replaces_the_schedulers_own(scheduler_config: dict[str, Any], shift: float) -> None:
    replaced = load_noise_table(scheduler_config, shift)
    made_so = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert torch.equal(replaced.sigmas, made_so.sigmas)
    assert torch.equal(replaced.timesteps, made_so.timesteps)
    torch.testing.assert_close(replaced.sigmas.double(), shifted(shift), atol=1e-6, rtol=1e-6)


def diffusers_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """As train_dreambooth_lora_sd3.py finds them: each timestep's place in the table, then four dimensions."""
    places = [int((scheduler.timesteps == timestep).nonzero()) for timestep in timesteps]
    return scheduler.sigmas[places].view(-1, 1, 1, 1)


@pytest.mark.parametrize("precondition", [False, True], ids=["velocity", "preconditioned"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_is_diffusers(table: NoiseTable, scheme: str, precondition: bool) -> None:
    config = FlowConfig(
        weighting_scheme=scheme,  # type: ignore[arg-type]
        logit_mean=0.2,
        logit_std=1.1,
        mode_scale=0.8,
        precondition_outputs=precondition,
    )
    generator = torch.Generator().manual_seed(5)
    latents, noise, output = (torch.randn(SHAPE, generator=generator) for _ in range(3))

    # diffusers' example, line by line
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    density = compute_density_for_timestep_sampling(
        scheme, 64, 0.2, 1.1, 0.8, generator=torch.Generator().manual_seed(9)
    )
    timesteps = scheduler.timesteps[(density * scheduler.config.num_train_timesteps).long()]
    expected_sigmas = diffusers_sigmas(scheduler, timesteps)
    noisy = (1.0 - expected_sigmas) * latents + expected_sigmas * noise
    prediction = output * (-expected_sigmas) + noisy if precondition else output
    target = latents if precondition else noise - latents
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=expected_sigmas)
    squares = weighting.float() * (prediction.float() - target.float()) ** 2
    expected = squares.reshape(target.shape[0], -1).mean(1).mean()

    indices = sample_indices(64, table, config, torch.Generator().manual_seed(9))
    sigmas = table.sigmas[indices].view(-1, 1, 1, 1)
    assert len(indices.unique()) > 40
    assert torch.equal(table.timesteps[indices], timesteps)
    torch.testing.assert_close(sigmas, expected_sigmas, atol=0, rtol=1e-6)
    torch.testing.assert_close(interpolate(latents, noise, sigmas), noisy, atol=1e-6, rtol=1e-6)
    loss = flow_matching_loss(output, latents, noise, sigmas, torch.ones(64), config)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)


def test_the_target_is_noise_minus_latents() -> None:
    """A velocity that is right has no loss; walked back from any noise level it is the picture."""
    latents, noise = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([0.01, 0.5, 1.0]).view(-1, 1, 1, 1)
    velocity = noise - latents
    for precondition in (False, True):
        config = FlowConfig(precondition_outputs=precondition)
        assert flow_matching_loss(velocity, latents, noise, sigmas, torch.ones(3), config) < 1e-12
        assert flow_matching_loss(-velocity, latents, noise, sigmas, torch.ones(3), config) > 1
    torch.testing.assert_close(interpolate(latents, noise, sigmas) - sigmas * velocity, latents)


def test_preconditioning_is_sigma_squared_times_the_loss() -> None:
    velocity, latents, noise = torch.randn(3, 4, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    sigmas = torch.full((4, 1, 1, 1), 0.1)
    plain, preconditioned = (
        flow_matching_loss(velocity, latents, noise, sigmas, torch.ones(4), FlowConfig(precondition_outputs=flag))
        for flag in (False, True)
    )
    assert FlowConfig().precondition_outputs is False
    torch.testing.assert_close(preconditioned, 0.01 * plain, atol=0, rtol=1e-4)


def test_each_sample_has_its_weight() -> None:
    velocity, latents, noise = torch.randn(3, 3, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    sigmas = torch.tensor([0.2, 0.5, 0.9]).view(-1, 1, 1, 1)
    alone = [
        flow_matching_loss(*(t[i : i + 1] for t in (velocity, latents, noise, sigmas)), torch.ones(1), FlowConfig())
        for i in range(3)
    ]
    weights = torch.tensor([1.0, 0.0, 0.25])
    loss = flow_matching_loss(velocity, latents, noise, sigmas, weights, FlowConfig())
    torch.testing.assert_close(loss, (alone[0] + 0.25 * alone[2]) / 3)


@pytest.mark.parametrize(("logit_mean", "mean_sigma"), [(1.0, 0.52), (-1.0, 0.86)])
def test_a_positive_logit_mean_draws_less_noise(table: NoiseTable, logit_mean: float, mean_sigma: float) -> None:
    """diffusers' sign, the opposite of the paper's; figures measured with diffusers itself."""
    indices = sample_indices(20_000, table, FlowConfig(logit_mean=logit_mean), torch.Generator().manual_seed(0))
    assert table.sigmas[indices].mean().item() == pytest.approx(mean_sigma, abs=0.006)


def test_schemes_that_only_weight_draw_evenly(table: NoiseTable) -> None:
    expected = table.sigmas.mean().item()
    for scheme in ("sigma_sqrt", "cosmap", "none"):
        config = FlowConfig(weighting_scheme=scheme)  # type: ignore[arg-type]
        indices = sample_indices(20_000, table, config, torch.Generator().manual_seed(0))
        assert table.sigmas[indices].mean().item() == pytest.approx(expected, abs=0.006)
        assert indices.float().mean().item() == pytest.approx(499.5, abs=6)


def test_a_density_of_one_stays_in_the_table(table: NoiseTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mode` at u = 0 gives exactly 1, and a large logit rounds to it."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))
        assert sample_indices(3, table, FlowConfig(weighting_scheme="mode"), torch.Generator()).tolist() == [999] * 3
    saturated = FlowConfig(logit_mean=200.0, logit_std=0.0)
    assert sample_indices(2, table, saturated, torch.Generator()).tolist() == [999] * 2
    negative = FlowConfig(weighting_scheme="mode", mode_scale=20.0)  # leaves [0, 1] at both ends
    indices = sample_indices(1000, table, negative, torch.Generator().manual_seed(0))
    assert (indices.min(), indices.max()) == (0, 999)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_outputs_give_a_finite_float32_loss(table: NoiseTable, scheme: str) -> None:
    """1/sigma² of the least noise is past what float16 holds (65,504)."""
    sigmas = table.sigmas[-2:].view(-1, 1, 1, 1)
    assert (sigmas**-2).max() > 65_504
    velocity, latents, noise = torch.randn(3, 2, 16, 4, 4, generator=torch.Generator().manual_seed(4))
    config = FlowConfig(weighting_scheme=scheme)  # type: ignore[arg-type]
    loss = flow_matching_loss(velocity.half(), latents, noise, sigmas, torch.ones(2), config)
    assert loss.dtype == torch.float32
    exact = flow_matching_loss(velocity.half().float(), latents, noise, sigmas, torch.ones(2), config)
    assert torch.isfinite(loss)
    assert torch.equal(loss, exact)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="--logit_std"):
        FlowConfig(logit_std=-0.1)
    for shift in (0.0, -3.0):
        with pytest.raises(ValueError, match=r"--timestep_shift must be positive: 3\.0"):
            replace(FlowConfig(), timestep_shift=shift)


def test_a_shift_is_obeyed_where_the_scheduler_shifts_dynamically() -> None:
    """Such a scheduler leaves its table unshifted."""
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True}
    plain = load_noise_table({"shift": 1.0}, None).sigmas
    assert torch.equal(load_noise_table(dynamic, None).sigmas, plain)
    shifted = load_noise_table(dynamic, 2.0).sigmas
    torch.testing.assert_close(shifted, 2 * plain / (1 + plain))
