"""Which steps lead from noise to a picture: diffusers' schedulers by name, and SD3's schedule of noise levels.

These follow the velocity alone, so that a picture is that of its noise. Of diffusers' others that know flow matching,
FlowMatchLCM and SASolver draw noise of their own in every step; DEIS and the single-step DPM-Solver++ come less close
to the exact solution than what is here, with as many calls of the transformer (`tests/drawing/test_schedulers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.drawing.config import SCHEDULERS, SchedulerName

import diffusers


@dataclass(frozen=True)
class _Kind:
    """The name of diffusers' class, and what it calls the shift of the noise levels.

    A class is imported when it is used: some import scipy, where that is installed.
    """

    class_name: str
    shift_name: str
    fixed: Mapping[str, Any]

    @property
    def make(self) -> Any:
        """The class."""
        return getattr(diffusers, self.class_name)


_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_KINDS: dict[SchedulerName, _Kind] = {
    "euler": _Kind("FlowMatchEulerDiscreteScheduler", "shift", {}),
    "heun": _Kind("FlowMatchHeunDiscreteScheduler", "shift", {}),
    "dpmpp_2m": _Kind("DPMSolverMultistepScheduler", "flow_shift", {**_FLOW, "solver_order": 2}),
    "unipc": _Kind("UniPCMultistepScheduler", "flow_shift", {**_FLOW, "solver_order": 2}),
}
assert tuple(_KINDS) == tuple(SCHEDULERS)


def make_scheduler(name: SchedulerName, config: Mapping[str, Any], shift: float | None = None) -> Any:
    """A scheduler with no state yet.

    Args:
        name: one of `SCHEDULERS`.
        config: of the model's scheduler.
        shift: of the noise levels, s in `s σ / (1 + (s - 1) σ)` (arXiv 2403.03206, equation 23); None for the model's.

    Raises:
        UserError: the model shifts its noise levels by the size of a picture, for which this needs Euler as it is.
    """
    kind = _KINDS[name]
    if config.get("use_dynamic_shifting"):
        if name != "euler" or shift is not None:
            raise UserError(
                "this model's noise levels shift with the size of a picture, which is --scheduler euler without "
                "--timestep_shift: leave both out"
            )
        return kind.make.from_config(dict(config))
    shift = config.get("shift", 1.0) if shift is None else shift
    if name == "euler":  # with whatever else the model's configuration asks of it
        return kind.make.from_config(dict(config), shift=shift)
    steps = config.get("num_train_timesteps", 1000)
    return kind.make(num_train_timesteps=steps, **{kind.shift_name: shift}, **kind.fixed)


def set_noise_levels(scheduler: Any, num_steps: int, device: Any, tokens: int) -> list[tuple[Any, int]]:
    """Sets a scheduler's steps; returns each call's timestep with the index of its noise level, from 0.

    Heun calls the transformer twice at most levels: at the end of a step, and at the beginning of the next.

    Args:
        scheduler: of `make_scheduler`.
        num_steps: noise levels.
        device: of the timesteps.
        tokens: patches of a picture.
    """
    more = {"mu": _shift_exponent(scheduler.config, tokens)} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(num_steps, device=device, **more)
    scheduler.set_begin_index(0)  # else it is looked for by its timestep, which two may share where they are whole
    order = scheduler.order
    return [(timestep, (call + order - 1) // order) for call, timestep in enumerate(scheduler.timesteps)]


def _shift_exponent(config: Mapping[str, Any], tokens: int) -> float:
    """As `calculate_shift` of diffusers' pipelines, whose import takes a second."""
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (many - few)
    exponent: float = config["base_shift"] + slope * (tokens - few)
    return exponent
