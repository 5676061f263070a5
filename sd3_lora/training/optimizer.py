"""The optimizer of the LoRA: AdamW over one flat tensor, its schedule, and one step that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.copy_stream import DeviceFlag
from sd3_lora.training.config import OptimizerConfig

import torch
from diffusers.optimization import get_scheduler


def flatten_parameters(parameters: Sequence[torch.nn.Parameter]) -> torch.nn.Parameter:
    """One parameter with the memory of all, and its gradient with that of theirs.

    A LoRA is hundreds of small tensors: as one, it is unscaled, measured, clipped, updated, cleared and exchanged
    between processes by a kernel each. The update is elementwise, so its numbers are the same (8-bit states have their
    blocks of 256 cut elsewhere).

    Args:
        parameters: all of one dtype and device, without gradients yet. Their data and gradients become views, so that
            neither may be replaced afterwards, only written.
    """
    flat = torch.nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, gradient in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data = data.view_as(parameter)
        parameter.grad = gradient.view_as(parameter)
    return flat


def make_optimizer(
    config: OptimizerConfig, flat: torch.nn.Parameter, pictures_per_step: int, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, in 8 bits if asked, and its schedule.

    Raises:
        UserError: the schedule's numbers do not fit together.
    """
    rate = config.learning_rate * (pictures_per_step if config.scale_lr else 1)
    options: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        from sd3_lora.training.adam_8bit import AdamW8bit  # its import costs seconds, and only this needs it

        optimizer: torch.optim.Optimizer = AdamW8bit([flat], **options)
    else:
        # The fused one asks the device, not the host, whether the scaler found an infinity.
        optimizer = torch.optim.AdamW([flat], fused=flat.is_cuda, **options)
    try:
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=config.lr_step_rules,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except (ValueError, IndexError) as error:
        if config.lr_scheduler != "piecewise_constant":  # polynomial ends at 1e-7
            raise UserError(f"--lr_scheduler {config.lr_scheduler}: {error}: raise --learning_rate {rate:g}") from error
        raise UserError(f"--lr_step_rules {config.lr_step_rules} cannot be read: type for example 1:100,0.1") from error
    return optimizer, schedule


def optimizer_step(
    flat: torch.nn.Parameter, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_grad_norm: float
) -> tuple[torch.Tensor, DeviceFlag]:
    """Unscales, clips and applies the gradient, and clears it where it lies.

    Returns:
        Its norm before clipping, a float32 scalar on the device; and whether the scaler skipped the step, for an
        infinity or a NaN.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([flat], max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)
    was_infinite = norm.isfinite().logical_not() if scaler.is_enabled() else norm.new_zeros((), dtype=torch.bool)
    return norm, DeviceFlag.of(was_infinite)
