"""The optimizer: AdamW over flat tensors, its schedule, and a step without a host–device synchronisation."""

from __future__ import annotations

from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.copy_stream import DeviceFlag
from sd3_lora.training.config import OptimizerConfig
from sd3_lora.training.trainables import Trainables

import torch
from diffusers.optimization import get_scheduler


def bytes_per_parameter(config: OptimizerConfig, dtype: torch.dtype) -> float:
    """What a trained parameter takes on the device: itself, its gradient, and the optimizer's two moments.

    8-bit moments take 2 bytes and their scales. In fp16 all that 8-bit Adam changes is there twice for a moment, since
    a step may have to be undone.

    Args:
        config: of the optimizer.
        dtype: of autocast.
    """
    moments = 2.1 if config.use_8bit_adam else 8
    undone = 4 + moments if config.use_8bit_adam and dtype == torch.float16 else 0
    return 4 + 4 + moments + undone


def make_optimizer(config: OptimizerConfig, trainables: Trainables, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, in 8 bits if asked, and its schedule over so many steps.

    Raises:
        UserError: the schedule's numbers do not fit together.
    """
    groups = trainables.for_optimizer()
    options: dict[str, Any] = {
        "lr": groups[0]["lr"],  # the polynomial schedule reads the optimizer's, not the groups'
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        from sd3_lora.training.adam_8bit import AdamW8bit  # its import takes seconds, and only this needs it

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    else:
        # The fused one asks the device, not the host, whether the scaler found an infinity.
        is_fused = all(parameter.is_cuda for parameter in trainables.parameters)
        optimizer = torch.optim.AdamW(groups, fused=is_fused, **options)
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
            raise UserError(
                f"--lr_scheduler {config.lr_scheduler}: {error}: raise --learning_rate {config.learning_rate:g}"
            ) from error
        raise UserError(f"--lr_step_rules {config.lr_step_rules} cannot be read: type for example 1:100,0.1") from error
    return optimizer, schedule


def optimizer_step(
    trainables: Trainables, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_grad_norm: float
) -> tuple[torch.Tensor, DeviceFlag]:
    """Unscales, clips and applies the gradient, and clears it where it lies.

    Returns:
        Its norm before clipping, a float32 scalar on the device; and whether the scaler skipped the step, for an
        infinity or a NaN.
    """
    scaler.unscale_(optimizer)
    norm = trainables.clip(max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)
    was_infinite = norm.isfinite().logical_not() if scaler.is_enabled() else norm.new_zeros((), dtype=torch.bool)
    return norm, DeviceFlag.of(was_infinite)
