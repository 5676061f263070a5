"""The optimizers that `--optimizer` names: where each comes from, its defaults, and the bytes that it takes.

Read with the command line, so it imports no library.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        name: as `--optimizer` has it.
        package: that it is imported from, and that pip installs.
        state_bytes: of a trained number.
        state_bytes_over_rank: likewise, to be divided by the LoRA's rank: of what is kept for rows and columns.
        step_bytes: of a trained number, for what exists within a step alone.
        can_undo: whether the device undoes a step that the scaler skips, which needs a copy of parameter and state.
        learning_rate: its default.
        beta1: the default of `--adam_beta1`; None where there is no such thing.
        beta2: likewise.
        epsilon: likewise.
        needs_matrices: whether its numbers on one flat tensor are not those on the LoRA's matrices.
    """

    name: str
    package: str
    state_bytes: float
    state_bytes_over_rank: float = 0
    step_bytes: float = 0
    can_undo: bool = False
    learning_rate: float = 1e-4
    beta1: float | None = 0.9
    beta2: float | None = 0.999
    epsilon: float | None = 1e-8
    needs_matrices: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None


# Their library's defaults where diffusers' scripts have no flag. A state of 8 bits has a float32 scale for 256 numbers.
ADAMW = OptimizerKind("AdamW", "torch", 8)
ADAMW_8BIT = OptimizerKind("adamw_8bit", "bitsandbytes", 2.1, can_undo=True)
PAGED_ADAMW_8BIT = OptimizerKind("paged_adamw_8bit", "bitsandbytes", 2.1)
ADEMAMIX_8BIT = OptimizerKind("ademamix_8bit", "bitsandbytes", 3.1, can_undo=True)
LION_8BIT = OptimizerKind("lion_8bit", "bitsandbytes", 1.1, can_undo=True, beta2=0.99, epsilon=None)
ADAFACTOR = OptimizerKind(
    "adafactor", "transformers", 0.1, state_bytes_over_rank=4, beta1=None, beta2=None, epsilon=None, needs_matrices=True
)
PRODIGY = OptimizerKind("prodigy", "prodigyopt", 16, step_bytes=4, learning_rate=1.0)
SCHEDULE_FREE_ADAMW = OptimizerKind("schedule_free_adamw", "schedulefree", 8, step_bytes=4)

KINDS = (
    ADAMW,
    ADAMW_8BIT,
    PAGED_ADAMW_8BIT,
    ADEMAMIX_8BIT,
    LION_8BIT,
    ADAFACTOR,
    PRODIGY,
    SCHEDULE_FREE_ADAMW,
)
_BY_SPELLING = {kind.name.lower().replace("_", ""): kind for kind in KINDS} | {
    "adamwschedulefree": SCHEDULE_FREE_ADAMW  # its class's name
}

ADAMW_SPELLINGS = frozenset("".join(letters) for letters in itertools.product(*zip("adamw", "ADAMW", strict=True)))


def find_kind(name: str) -> OptimizerKind | None:
    """The kind of that name: in any case, with `_`, `-` or neither (AdamW8bit). None where there is none."""
    return _BY_SPELLING.get(name.lower().replace("_", "").replace("-", ""))
