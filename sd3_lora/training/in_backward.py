"""AdamW inside the backward pass: each tensor's gradient is applied and freed as soon as it is there.

So one gradient is in memory at a time, and not one for each weight (as in torch's tutorial "How to save memory by
fusing the optimizer step into the backward pass", and in LOMO, arXiv 2306.09782). What that rules out: a norm of all
gradients is known too late to clip by it, and each tensor's is clipped by itself; and gradients of several
micro-batches cannot be added up, unless all are kept: then the update follows the last of them, tensor by tensor.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from sd3_lora.common.command_line import first_line
from sd3_lora.gpu.copy_stream import DeviceFlag
from sd3_lora.training.blockwise_adam import (
    BLOCK,
    Moments,
    PackedMoments,
    Settings,
    Tables,
    Update,
    new_moments,
    state_bytes,
    step_numbers,
    update_blocks,
    update_small,
)
from sd3_lora.training.stochastic_rounding import step_keys

import torch

UNTRAINED = "pos_embed.pos_embed"  # a buffer
# Plain operations make a dozen float32 of each number that they update: 12 MiB for so many blocks.
BLOCKS_AT_A_TIME = 1024
# A GPU takes as long for each of these operations as for eight times as many numbers.
BLOCKS_AT_A_TIME_ON_GPU = 8 * BLOCKS_AT_A_TIME


class AdamInBackward(torch.optim.Optimizer):
    """AdamW of a whole model, with its moments in 8 bits. The gradients are there only while they are applied.

    In a step: `begin`, then the micro-batches, then `step`. All numbers that change from step to step are on the
    device, so that a CUDA graph of a micro-step can be replayed.

    A tensor whose gradient is not finite stays as it is in that step. One that had none yet is left alone.

    Args:
        parameters: all that is trained, by name; contiguous, float32 or bfloat16.
        rate: the learning rate, which a schedule may change.
        weight_decay: of AdamW.
        settings: what does not change.
        seed: of the run, for the rounding.
        window: micro-batches of a step. With several the gradients are kept, as the parameters' `grad`.

    Attributes:
        squares: of each tensor's gradient in this step the squared norm, `(tensors,)` float32 on the device.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        rate: float,
        weight_decay: float,
        settings: Settings,
        seed: int,
        window: int = 1,
    ):
        # The polynomial schedule reads the rate of the defaults, others the group's.
        super().__init__(list(parameters.values()), {"lr": rate, "weight_decay": weight_decay})
        self._parameters, self._settings, self._seed, self._window = dict(parameters), settings, seed, window
        device = next(iter(parameters.values())).device
        self._tables = Tables.on(device)
        self.squares = torch.zeros(len(parameters), device=device)
        self._numbers = torch.zeros(4, device=device)
        self._keys = torch.zeros(len(parameters), 2, dtype=torch.int32, device=device)
        self._is_armed = torch.ones((), dtype=torch.bool, device=device)
        self._moments = {name: new_moments(each.numel(), device) for name, each in parameters.items()}
        self._moments_of = list(self._moments.values())
        self._had_gradient: dict[int, None] = {}  # places of parameters, in the order of backward
        self._update_blocks, self._update_small = _compiled_updates(device, settings, self._tables)
        for place, parameter in enumerate(parameters.values()):
            parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), place))
            if window > 1:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def gradients(self) -> list[torch.Tensor]:
        """What a micro-step adds to: the kept gradients, or the squares of their norms."""
        if self._window == 1:
            return [self.squares]
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    @torch.no_grad()
    def begin(self, step: int, rate: float) -> None:
        """To be called before the micro-batches of a step.

        Args:
            step: from 1.
            rate: of this step.
        """
        decay = self.param_groups[0]["weight_decay"]
        for place, number in enumerate(step_numbers(rate, decay, self._settings.betas, step)):
            self._numbers[place].fill_(number)  # a copy from the host would wait for the device
        self._keys.copy_(step_keys(self._seed, step, len(self._parameters), self._keys.device))
        self.squares.zero_()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside the block updates are computed and change nothing: a graph is tried out before it counts."""
        self._is_armed.fill_(False)
        try:
            yield
        finally:
            self._is_armed.fill_(True)

    @torch.no_grad()
    def take(self, place: int, parameter: torch.Tensor) -> None:
        """Called by backward when a tensor's gradient is whole."""
        self._had_gradient[place] = None
        if self._window == 1:
            self._apply(place, parameter)
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Ends a step: where gradients were kept, they are applied now, and cleared."""
        for place, parameter in enumerate(self._parameters.values()) if self._window > 1 else ():
            if place in self._had_gradient and parameter.grad is not None:
                self._apply(place, parameter)
                parameter.grad.zero_()

    def _apply(self, place: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        self.squares[place] += square
        update = Update(self._is_armed & square.isfinite(), square, self._numbers, self._keys[place])
        moments = self._moments_of[place]
        weights, gradient = parameter.detach().view(-1), parameter.grad.detach().reshape(-1)
        if isinstance(moments, Moments):
            self._update_small(weights, gradient, moments, update)
            return
        lacking = -weights.numel() % BLOCK
        if not lacking:
            self._update_blocks(weights.view(-1, BLOCK), gradient.view(-1, BLOCK), moments, update)
            return
        whole = torch.nn.functional.pad(weights, (0, lacking)).view(-1, BLOCK)
        padded = torch.nn.functional.pad(gradient, (0, lacking)).view(-1, BLOCK)
        self._update_blocks(whole, padded, moments, update)
        weights.copy_(whole.view(-1)[: weights.numel()])

    def norm(self) -> torch.Tensor:
        """Of all gradients of the step, a float32 scalar on the device: infinite or NaN where one's is."""
        return self.squares.sum().sqrt()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All moments by name, such as `proj_out.weight.first_scale`: the memory itself, no copies."""
        return {
            f"{name}.{part}": tensor
            for name, moments in self._moments.items()
            for part, tensor in moments._asdict().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """All but `tensors`: which parameters have had a gradient."""
        return {"had_gradient": list(self._had_gradient)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken; `tensors` are to be written beside it."""
        self._had_gradient = dict.fromkeys(state_dict["had_gradient"])


def _hook(optimizer: weakref.ref[AdamInBackward], place: int) -> Callable[[torch.Tensor], None]:
    """For a parameter. It must not keep its optimizer: Python's collector sees no hooks, and a circle would stay."""

    def take(parameter: torch.Tensor) -> None:
        owner = optimizer()
        if owner is not None:
            owner.take(place, parameter)

    return take


def update_bytes(device: torch.device) -> int:
    """What an update takes for a moment, beside the gradient that it applies."""
    return 12 * 4 * BLOCK * _blocks_at_a_time(device)


def _blocks_at_a_time(device: torch.device) -> int:
    """For plain operations; a compiled update has no use for them, and may turn out not to be compiled."""
    return BLOCKS_AT_A_TIME_ON_GPU if device.type == "cuda" and not _has_triton() else BLOCKS_AT_A_TIME


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def whole_bytes(shapes: Mapping[str, torch.Size], dtype: torch.dtype, window: int, device: torch.device) -> int:
    """What training all weights takes on the device beside them: moments, gradients that are kept, and an update.

    Args:
        shapes: of the weights, by name.
        dtype: of the weights.
        window: micro-batches of a step.
        device: that trains.
    """
    counts = [shape.numel() for name, shape in shapes.items() if name != UNTRAINED]
    kept = dtype.itemsize * sum(counts) if window > 1 else 0
    return sum(map(state_bytes, counts)) + kept + update_bytes(device)


def finished_step(optimizer: AdamInBackward) -> tuple[torch.Tensor, DeviceFlag]:
    """Ends the optimizer's step, without a host–device synchronisation.

    Returns:
        The norm of all gradients, a float32 scalar on the device; and that the step was not skipped.
    """
    optimizer.step()
    return optimizer.norm(), DeviceFlag(torch.zeros((), dtype=torch.bool), None)


_UpdateBlocks = Callable[[torch.Tensor, torch.Tensor, PackedMoments, Update], None]
_UpdateSmall = Callable[[torch.Tensor, torch.Tensor, Moments, Update], None]


def _compiled_updates(device: torch.device, settings: Settings, tables: Tables) -> tuple[_UpdateBlocks, _UpdateSmall]:
    """The updates, on a GPU each compiled to a few kernels: plain operations would read the weights twenty times.

    Where nothing can be compiled, as without Triton, they are plain.
    """
    plain = partial(_in_chunks, settings=settings, tables=tables), partial(update_small, settings=settings)
    if device.type != "cuda" or not _has_triton():
        return plain
    blocks = partial(torch.compile(update_blocks), settings=settings, tables=tables)
    small = partial(torch.compile(update_small), settings=settings)
    try:
        _try_out(device, blocks, small)
    except Exception as error:  # of a compiler: the plain operations have the same numbers
        print(f"note: the optimizer's update is not compiled ({first_line(error)})")
        return plain
    return blocks, small


def _in_chunks(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    moments: PackedMoments,
    update: Update,
    settings: Settings,
    tables: Tables,
) -> None:
    """`update_blocks` of a few blocks at a time, for what plain operations take."""
    most = _blocks_at_a_time(weights.device)
    for start in range(0, len(weights), most):
        rows = slice(start, start + most)
        part = PackedMoments(*(tensor[rows] for tensor in moments))
        update_blocks(weights[rows], gradient[rows], part, update, settings, tables, start * BLOCK)


@torch.no_grad()
def _try_out(device: torch.device, blocks: _UpdateBlocks, small: _UpdateSmall) -> None:
    """Compiles before anything depends on it.

    With two lengths of each kind: torch then compiles for all lengths, and knows that a block has 256 numbers.
    """
    key = torch.zeros(2, dtype=torch.int32, device=device)
    counts = torch.ones((), dtype=torch.bool, device=device)
    update = Update(counts, torch.zeros((), device=device), torch.ones(4, device=device), key)
    for count in (2 * BLOCK, 3 * BLOCK, 64 * BLOCK, 65 * BLOCK):
        values = torch.zeros(count, dtype=torch.bfloat16, device=device)
        moments = new_moments(count, device)
        if isinstance(moments, Moments):
            small(values, values.clone(), moments, update)
        else:
            blocks(values.view(-1, BLOCK), values.clone().view(-1, BLOCK), moments, update)


def adam_notes(window: int, max_grad_norm: float) -> Iterator[str]:
    """What a user may not expect of these updates, in sentences."""
    yield (
        f"note: each tensor's gradient is clipped to a norm of {max_grad_norm:g} by itself: that of all is known only "
        "when they have been applied"
    )
    if window > 1:
        yield (
            "note: --gradient_accumulation_steps keeps a gradient for each weight, as much memory as the weights: a "
            "larger --train_batch_size does without"
        )
