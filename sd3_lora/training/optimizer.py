"""The optimizer of the LoRA, its schedule, and its step."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.copy_stream import DeviceFlag
from sd3_lora.training.blockwise_adam import Settings
from sd3_lora.training.in_backward import AdamInBackward, finished_step
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.training.optimizer_kinds import (
    ADAFACTOR,
    ADAMW,
    ADAMW_8BIT,
    ADEMAMIX_8BIT,
    LION_8BIT,
    PAGED_ADAMW_8BIT,
    PRODIGY,
    SCHEDULE_FREE_ADAMW,
)
from sd3_lora.training.trainables import Trainables
from sd3_lora.transformer.streaming import StreamedBlocks
from sd3_lora.transformer.trained_pieces import TrainedBlocks

import torch
from diffusers.optimization import get_scheduler

_SLOW_BETA = 0.9999  # of AdEMAMix's second first moment: its library's default


def bytes_per_parameter(config: OptimizerConfig, dtype: torch.dtype, rank: int) -> float:
    """What a trained number takes on the device: itself, its gradient, the optimizer's state, and what a step needs.

    In fp16 all that an 8-bit optimizer changes is there twice for a moment, since a step may have to be undone.

    Args:
        config: of the optimizer.
        dtype: of autocast.
        rank: of the LoRA: Adafactor's state is a number for each row and each column.
    """
    kind = config.kind
    state = kind.state_bytes + kind.state_bytes_over_rank / rank
    undone = 4 + state if kind.can_undo and dtype == torch.float16 else 0
    return 4 + 4 + state + kind.step_bytes + undone


def optimizer_notes(config: OptimizerConfig, device: torch.device) -> Iterator[str]:
    """What a user may not expect of the optimizer, in sentences."""
    if config.kind == PRODIGY and config.rate <= 0.1:
        yield (
            f"note: prodigy finds the learning rate by itself, and --learning_rate {config.rate:g} multiplies it: "
            "leave it out, or type about 1"
        )
    if config.kind == PAGED_ADAMW_8BIT and device.type == "cpu":
        yield "note: on a CPU nothing is paged: paged_adamw_8bit is adamw_8bit here"


def make_optimizer(config: OptimizerConfig, trainables: Trainables, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer that was asked for, and its schedule over so many steps.

    Raises:
        UserError: the schedule's numbers do not fit together, or the groups' rates do not fit the optimizer.
    """
    groups = trainables.for_optimizer(config.kind.needs_matrices)
    options: dict[str, Any] = {
        "lr": groups[0]["lr"],  # the polynomial schedule reads the optimizer's, not the groups'
        "weight_decay": config.adam_weight_decay,
    }
    if config.betas is not None:
        options["betas"] = config.betas
    if config.epsilon is not None:
        options["eps"] = config.epsilon
    optimizer = _MAKERS[config.kind.name](config, groups, options)
    return optimizer, _make_schedule(config, optimizer, steps)


def _make_schedule(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    try:
        return get_scheduler(
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
                f"--lr_scheduler {config.lr_scheduler}: {error}: raise --learning_rate {config.rate:g}"
            ) from error
        raise UserError(f"--lr_step_rules {config.lr_step_rules} cannot be read: type for example 1:100,0.1") from error


def make_optimizer_in_backward(
    config: OptimizerConfig,
    weights: Trainables,
    steps: int,
    seed: int,
    window: int,
    by_chance: bool,
    streamed: StreamedBlocks | None = None,
) -> tuple[AdamInBackward, Any]:
    """The optimizer of the whole transformer, and its schedule over so many steps.

    Args:
        config: of the optimizer.
        weights: each a group of its own.
        steps: of the whole run.
        seed: of the run.
        window: micro-batches of a step.
        by_chance: whether bfloat16 weights are rounded so.
        streamed: what streams blocks of them, if any are.

    Raises:
        UserError: as `make_optimizer`; or the driver does not pin so much host memory.
    """
    settings = Settings(config.betas or (0.9, 0.999), config.epsilon or 0.0, config.max_grad_norm, by_chance)
    by_name = {group.name: group.flat for group in weights.groups}
    rate = weights.groups[0].learning_rate
    trained = streamed if isinstance(streamed, TrainedBlocks) else None
    optimizer = AdamInBackward(by_name, rate, config.adam_weight_decay, settings, seed, window, trained)
    return optimizer, _make_schedule(config, optimizer, steps)


_Groups = list[dict[str, Any]]  # torch's
_Options = dict[str, Any]  # that most optimizers share


def _adamw(_: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    # The fused one asks the device, not the host, whether the scaler found an infinity.
    return torch.optim.AdamW(groups, fused=_is_on_gpu(groups), **options)


def _adamw_8bit(_: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    from sd3_lora.training.optimizers_8bit import AdamW8bit  # its import takes seconds, and only these need it

    return AdamW8bit(groups, **options)


def _paged_adamw_8bit(config: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    from sd3_lora.training.optimizers_8bit import PagedAdamW8bit

    return PagedAdamW8bit(groups, **options) if _is_on_gpu(groups) else _adamw_8bit(config, groups, options)


def _ademamix_8bit(_: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    from sd3_lora.training.optimizers_8bit import AdEMAMix8bit

    options = {**options, "betas": (*options["betas"], _SLOW_BETA)}
    return AdEMAMix8bit(groups, **options)  # type: ignore[arg-type]  # it takes groups too


def _lion_8bit(_: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    from sd3_lora.training.optimizers_8bit import Lion8bit

    return Lion8bit(groups, **options)


def _adafactor(_: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # Steps scaled by the weights' size would leave lora_B, which starts at zero, where it is: a thousandth of the rate.
    return Adafactor(groups, scale_parameter=False, relative_step=False, **options)


def _prodigy(config: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    rates = {group["lr"] for group in groups}
    if len(rates) > 1:
        raise UserError(
            f"--optimizer prodigy finds one learning rate for all, and cannot have {sorted(rates)}: give equal ones"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decays the weights
        return Prodigy(groups, **options, **config.prodigy_options())


def _schedule_free_adamw(_: OptimizerConfig, groups: _Groups, options: _Options) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, **options)
    optimizer.train()  # for good: `averaged_weights` is its eval mode
    return optimizer


_MAKERS: dict[str, Callable[[OptimizerConfig, _Groups, _Options], torch.optim.Optimizer]] = {
    ADAMW.name: _adamw,
    ADAMW_8BIT.name: _adamw_8bit,
    PAGED_ADAMW_8BIT.name: _paged_adamw_8bit,
    ADEMAMIX_8BIT.name: _ademamix_8bit,
    LION_8BIT.name: _lion_8bit,
    ADAFACTOR.name: _adafactor,
    PRODIGY.name: _prodigy,
    SCHEDULE_FREE_ADAMW.name: _schedule_free_adamw,
}


def _is_on_gpu(groups: _Groups) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def rate_in_force(optimizer: torch.optim.Optimizer) -> float:
    """The first group's learning rate in the coming step: what the schedule says, times what Prodigy has found."""
    group = optimizer.param_groups[0]
    rate: float = group["lr"] * group.get("d", 1.0)
    return rate


def optimizer_step(
    trainables: Trainables, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_grad_norm: float
) -> tuple[torch.Tensor, DeviceFlag]:
    """Unscales, clips and applies the gradient, and clears it where it lies.

    Without a host–device synchronisation with AdamW and the 8-bit ones that are not paged. Prodigy reads two numbers
    of each group; and under a scaler all others wait for its answer.

    Returns:
        Its norm before clipping, a float32 scalar on the device; and whether the scaler skipped the step, for an
        infinity or a NaN.
    """
    if isinstance(optimizer, AdamInBackward):
        return finished_step(optimizer)
    scaler.unscale_(optimizer)
    norm = trainables.clip(max_grad_norm)  # before the step: schedule-free AdamW overwrites the gradient
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)
    was_infinite = norm.isfinite().logical_not() if scaler.is_enabled() else norm.new_zeros((), dtype=torch.bool)
    return norm, DeviceFlag.of(was_infinite)
