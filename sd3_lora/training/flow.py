"""Rectified flow: sigmas, interpolation, velocity, loss (Esser et al., arXiv 2403.03206).

Shapes: B batch. sigma 0 is the picture, sigma 1 the noise. All of this is float32, whatever the model's dtype.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sd3_lora.training.flow_flags import FlowConfig

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch.nn.functional import softplus


@dataclass(frozen=True)
class NoiseTable:
    """diffusers' table of noise levels, from the most noise to the least.

    Attributes:
        sigmas: `(1000,)` float32 in (0, 1].
        timesteps: `(1000,)` float32 in (0, 1000], the transformer's input.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor

    @property
    def identity(self) -> str:
        """A short hash of its levels to six decimals."""
        levels = [f"{level:.6f}" for level in self.sigmas.tolist()]
        return hashlib.sha256(" ".join(levels).encode()).hexdigest()[:12]


def load_noise_table(scheduler_config: dict[str, Any], timestep_shift: float | None) -> NoiseTable:
    """The scheduler's training table, with the given shift, or with its configured one.

    A scheduler with `use_dynamic_shifting` leaves its table unshifted, whatever its `shift`; a given one is obeyed.
    """
    overrides = {} if timestep_shift is None else {"shift": timestep_shift, "use_dynamic_shifting": False}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config, **overrides)
    return NoiseTable(scheduler.sigmas[: len(scheduler.timesteps)].float(), scheduler.timesteps.float())


def sample_table_indices(count: int, table: NoiseTable, config: FlowConfig, generator: torch.Generator) -> torch.Tensor:
    """Draws `(count,)` rows of the noise table by the weighting scheme (section 3.1 of the paper)."""
    density = compute_density_for_timestep_sampling(
        config.weighting_scheme, count, config.logit_mean, config.logit_std, config.mode_scale, generator=generator
    )
    # A density of exactly 1 (the ends of `mode`, or a rounded sigmoid) would point past the table.
    return (density * len(table.sigmas)).long().clamp(0, len(table.sigmas) - 1)


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """The point at sigma on the straight line from the picture to the noise (equation 13 of the paper).

    Args:
        latents: `(B, 16, H/8, W/8)` normalized.
        noise: of the same shape.
        sigmas: `(B, 1, 1, 1)`.
    """
    return (1.0 - sigmas) * latents + sigmas * noise


def mask_weights(masks: torch.Tensor, coverage: float, unmasked_weight: float) -> torch.Tensor:
    """How much each latent pixel of a picture weighs in the loss under --masked_loss.

    `weight(masks) / weight(coverage)`, where `weight(m) = m + (1 - m) * unmasked_weight`. So the mean over a picture's
    crops is 1, and the loss's scale does not depend on how much of the picture its mask covers; each crop counts by
    what it shows of the mask. (kohya's sd-scripts and, by default, OneTrainer do not divide.)

    Args:
        masks: of one crop or several, of any shape, from 0 to 1.
        coverage: the mean of the masks of all crops of the picture that are drawn from.
        unmasked_weight: from 0 to 1, of what the mask leaves out.

    Returns:
        float32, of the shape of `masks`.

    Raises:
        ValueError: nothing weighs anything: there is neither a mask nor an `unmasked_weight`.
    """
    mean_weight = coverage + (1 - coverage) * unmasked_weight
    if not mean_weight > 0:
        raise ValueError("a picture whose crops show nothing of its mask, and an unmasked_weight of 0")
    masks = masks.float()
    return (masks + (1 - masks) * unmasked_weight) / mean_weight


def flow_matching_loss(
    velocity: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    loss_weights: torch.Tensor,
    config: FlowConfig,
) -> torch.Tensor:
    """The weighted squared error of the predicted velocity, whose target is `noise - latents`.

    Args:
        velocity: the transformer's output `(B, 16, H/8, W/8)`.
        latents: normalized, of the same shape.
        noise: of the same shape.
        sigmas: `(B, 1, 1, 1)` float32.
        loss_weights: float32, the weight of each sample `(B,)`, or of each latent pixel `(B, 1, H/8, W/8)`.
        config: the weighting scheme, and whether to precondition.

    Returns:
        A float32 scalar: the mean over the batch.
    """
    errors = _squared_errors(velocity, latents, noise, sigmas, config)
    if loss_weights.dim() > 1:
        return (loss_weights * errors).flatten(1).mean(1).mean()
    return (loss_weights * errors.flatten(1).mean(1)).mean()


def _squared_errors(
    velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, config: FlowConfig
) -> torch.Tensor:
    """`flow_matching_loss` of each number, `(B, 16, H/8, W/8)` float32, before samples or pixels are weighted."""
    velocity = velocity.float()
    if config.precondition_outputs:
        # latents = noisy_latents - sigma * velocity (the line of `interpolate`, solved for its start)
        prediction, target = interpolate(latents, noise, sigmas) - sigmas * velocity, latents
    else:
        prediction, target = velocity, noise - latents
    weighting = compute_loss_weighting_for_sd3(config.weighting_scheme, sigmas)  # (B, 1, 1, 1)
    return weighting * (prediction - target) ** 2


def prediction_loss(
    velocity: torch.Tensor,
    base_velocity: torch.Tensor,
    sigmas: torch.Tensor,
    loss_weights: torch.Tensor,
    config: FlowConfig,
) -> torch.Tensor:
    """The weighted squared distance of the trained model's velocity from the base's, weighted as `flow_matching_loss`.

    Args:
        velocity: for the class prompt, `(B, 16, H/8, W/8)`.
        base_velocity: of the base alone, for the same prompt and noisy latents.
        sigmas: `(B, 1, 1, 1)` float32.
        loss_weights: as of `flow_matching_loss`. Of masks only the mean counts: the whole picture is to stay as it was.
        config: the weighting scheme, and whether to precondition.

    Returns:
        A float32 scalar: the mean over the batch.
    """
    if loss_weights.dim() > 1:
        loss_weights = loss_weights.flatten(1).mean(1)
    difference = velocity.float() - base_velocity.float()
    if config.precondition_outputs:  # the predicted pictures differ by -sigma times as much
        difference = sigmas * difference
    weighting = compute_loss_weighting_for_sd3(config.weighting_scheme, sigmas)  # (B, 1, 1, 1)
    return (loss_weights * (weighting * difference**2).flatten(1).mean(1)).mean()


def preference_loss(
    velocity: torch.Tensor,
    base_velocity: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    loss_weights: torch.Tensor,
    config: FlowConfig,
    weight: float,
) -> torch.Tensor:
    """Direct Consistency Optimization (Lee et al., arXiv 2402.12004): learn each sample until the base is beaten in it.

    Scaled so that its gradient is that of `flow_matching_loss` where the model is the base. Where the error of a sample
    is below the base's by 1 / weight, it is 0.54 of that; by twice as much, 0.24. `loss_weights` is `(B,)`.
    """
    both = (_squared_errors(v, latents, noise, sigmas, config) for v in (velocity, base_velocity))
    errors, base_errors = (errors.flatten(1).mean(1) for errors in both)  # (B,)
    return (loss_weights * (2 / weight) * softplus(weight * (errors - base_errors))).mean()
