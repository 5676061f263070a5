"""Where the first number that is not finite comes from, asked after it has stopped a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sd3_lora.common.command_line import UserError, first_line
from sd3_lora.common.records import StepInputs
from sd3_lora.training.flow import interpolate
from sd3_lora.training.loss_log import NotFinite
from sd3_lora.training.micro_batches import MicroBatches
from sd3_lora.training.state import Training
from sd3_lora.training.watch import Watch
from sd3_lora.transformer.compiled import uncompiled
from sd3_lora.transformer.velocity import VelocityModel

import torch

_INPUTS = {
    "latents": ("latents", "delete --latents_path and run precompute_latents.py again"),
    "prompt_embeds": ("embeddings", "delete --data_df_path and run compute_embeddings.py again"),
    "pooled_prompt_embeds": ("embeddings", "delete --data_df_path and run compute_embeddings.py again"),
    "loss_weights": ("masks", "delete --latents_path and run precompute_latents.py again"),
}


@torch.no_grad()
def held_norms(training: Training) -> torch.Tensor | None:
    """The norms of what a run holds, infinite or NaN where one of its numbers is: of weights, state and average.

    `(3,)` float32 on the device, in the order of `loss_log.HELD`.

    Without a host–device synchronisation. None where the whole transformer is trained, whose gradients are checked
    before they change anything.
    """
    if training.in_backward:
        return None
    weights = training.trainables.parameters
    device, states = weights[0].device, training.optimizer.state.values()
    state = [value for each in states for value in tensors_in(each) if value.device == device]  # not what is paged
    average = training.average.tensors if training.average else []
    return torch.stack([_norm(tensors, device) for tensors in (weights, state, average)])


def tensors_in(state: object) -> Iterator[torch.Tensor]:
    """The floating-point tensors in an optimizer's state of a parameter, which may be nested."""
    if isinstance(state, torch.Tensor):
        if state.is_floating_point() and state.numel():
            yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)


def _norm(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))]).sum()


@dataclass(frozen=True)
class Cause:
    """Why a loss or a gradient is not finite.

    Attributes:
        culprit: what is wrong, a sentence without its end.
        remedy: what to type.
    """

    culprit: str
    remedy: str


def find_cause(model: VelocityModel, inputs: StepInputs, learning_rate: float) -> Cause:
    """Computes the base's velocity with its LoRA off, from the inputs of the step that failed.

    Where that is not finite either, no learning rate would have helped.

    Args:
        model: with whatever the step has left in its LoRA.
        inputs: of a micro-step.
        learning_rate: of the step.
    """
    for name, (what, remedy) in _INPUTS.items():
        if not getattr(inputs, name).isfinite().all():
            return Cause(f"its {what} hold a NaN or infinity", remedy)
    noisy_latents = interpolate(inputs.latents, inputs.noise, inputs.sigmas)
    conditions = (rows[: len(noisy_latents)] for rows in inputs.conditions)
    if model.base_velocity(noisy_latents, *conditions).isfinite().all():
        return Cause(
            "the base alone, without its LoRA, gives finite numbers there, so the LoRA has grown too large",
            f"lower --learning_rate {learning_rate:g}",
        )
    if model.dtype == torch.float16:
        return Cause(
            "the base alone, without its LoRA, overflows there in fp16, at any learning rate",
            "type --mixed_precision bf16, or --mixed_precision no",
        )
    return Cause(
        "the base alone, without its LoRA, gives no finite numbers there, at any learning rate",
        "its weights are damaged or made for other embeddings: give another --pretrained_model_name_or_path",
    )


def explained(error: NotFinite, training: Training, batches: MicroBatches, watch: Watch) -> UserError:
    """The sentence about a step that is not finite, with its cause, which is looked for in its first micro-batch."""
    if not error.by_computing or training.in_backward or error.step.drawn is None:
        return error
    try:
        watch.release()
        batches.go_back(error.step.drawn)
        batches.draw_ahead(1)
        with uncompiled(watch.compiled):
            cause = find_cause(training.model, batches.take()[0].inputs, error.step.learning_rate)
    except Exception as failure:  # whatever it is: the first error is worth more
        return UserError(f"{error} (why could not be found out: {first_line(failure)})")
    return UserError(f"{error.fault}; {cause.culprit}: {cause.remedy}; {error.kept}")
