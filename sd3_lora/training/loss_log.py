"""The loss log: one JSON line for each optimizer step, and the check that its numbers are finite.

Losses stay on the device and are read some steps late, so that a step has no host–device synchronisation.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sd3_lora.common.checksums import with_checksum, without_checksum
from sd3_lora.common.command_line import UserError, write_text_atomically
from sd3_lora.training.checkpoints import checkpoint_folders

import torch

READ_EVERY = 10  # steps; a number that is not finite stops the run at most so many steps later
MAX_SKIPPED_IN_A_ROW = 20
HELD = ("LoRA's weights are", "optimizer's state is", "moving average is")  # each before "not finite"
NOTED_SKIPPED_IN_A_ROW = 8  # a scaler that starts too high skips a few steps; so many are worth a word


@dataclass(frozen=True)
class LoggedStep:
    """One line of the log.

    Attributes:
        step: the optimizer step, from 1.
        loss: mean over the global batch.
        gradient_norm: before clipping; None for a step that the scaler skipped.
        learning_rate: of the step.
        skipped: whether the scaler skipped it for an infinite gradient.
        sigmas: the noise levels of its pictures, from 0 to 1; empty in a log of an earlier build.
    """

    step: int
    loss: float
    gradient_norm: float | None
    learning_rate: float
    skipped: bool
    sigmas: Sequence[float] = ()


class NotFinite(UserError):
    """A step's numbers are not finite. Says what can be known of it without the model.

    Attributes:
        step: the one that failed.
        fault: what is not finite, as "the loss is nan at step 4 in fp32 (pictures a.png)".
        kept: what was written before.
        by_computing: whether its own micro-steps made it, and not something that was there before.
    """

    def __init__(self, step: PendingStep, fault: str, remedy: str, kept: str, by_computing: bool):
        super().__init__(f"{fault}: {remedy}; {kept}")
        self.step, self.fault, self.kept, self.by_computing = step, fault, kept, by_computing


class SupportsBool(Protocol):
    """A boolean, or what waits for one when it is read."""

    def __bool__(self) -> bool: ...


@dataclass(frozen=True)
class PendingStep:
    """A step whose numbers are still on the device.

    Attributes:
        step: the optimizer step.
        loss: scalar tensor, this rank's mean.
        gradient_norm: scalar tensor, after the ranks' gradients were averaged.
        learning_rate: of the step.
        skipped: whether the scaler skipped it; not read before `LossLog.add`, since reading may wait for the device.
        pictures: file names that the step saw, for a diagnosis.
        sigmas: their noise levels, from 0 to 1, on the host.
        held: `(3,)`, the norms of what the run holds before the step's update (`held_norms`), still on the device.
        drawn: where the draws and the order stood before the step.
    """

    step: int
    loss: torch.Tensor
    gradient_norm: torch.Tensor
    learning_rate: float
    skipped: SupportsBool
    pictures: str
    sigmas: Sequence[float] = ()
    held: torch.Tensor | None = None
    drawn: Mapping[str, Any] | None = None


class LossLog:
    """Collects steps, and reads and checks them in one transfer.

    Args:
        path: of the JSON lines; None on ranks that do not write.
        mean_over_ranks: averages a tensor over the processes.
        dtype_name: of the run, for a diagnosis.
        track: is given each line, to send it elsewhere.

    Attributes:
        queued: the step before this one, of which the host has not asked yet whether the scaler skipped it.
        skipped_in_a_row: steps that the scaler skipped, up to the last one.
        skipped: all of them.
        recent: the losses of the last steps that were read.
    """

    def __init__(
        self,
        path: Path | None,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        dtype_name: str,
        track: Callable[[LoggedStep], None] = lambda _: None,
    ):
        self._path = path
        self._mean_over_ranks = mean_over_ranks
        self._dtype_name = dtype_name
        self._track = track
        self._pending: list[PendingStep] = []
        self.queued: PendingStep | None = None
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.recent = deque[float](maxlen=50)

    @property
    def recent_mean(self) -> float:
        """The mean loss of the last steps that were read; NaN before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    def add(self, step: PendingStep) -> None:
        """Takes a step without reading its numbers.

        Raises:
            UserError: the scaler has skipped too many steps in a row.
        """
        skipped = bool(step.skipped)
        self._pending.append(step)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == NOTED_SKIPPED_IN_A_ROW and self._path is not None:
            print(
                f"note: the scaler has skipped {NOTED_SKIPPED_IN_A_ROW} steps in a row up to step {step.step}, for "
                f"infinite gradients in {self._dtype_name}: it halves its scale at each; after "
                f"{MAX_SKIPPED_IN_A_ROW} the run stops"
            )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.read()
            raise UserError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had infinite gradients in {self._dtype_name} up to step "
                f"{step.step}: type --mixed_precision bf16 (or no), or lower --learning_rate"
            )

    def read(self) -> list[LoggedStep]:
        """Copies the pending steps to the host, checks them and appends them to the file.

        Raises:
            NotFinite: a loss or gradient, or what the run holds, is not, with the step and what it saw.
        """
        if not self._pending:
            return []
        losses = self._mean_over_ranks(torch.stack([p.loss.detach().float() for p in self._pending])).tolist()
        norms = torch.stack([p.gradient_norm.detach().float() for p in self._pending]).tolist()
        held = [pending.held for pending in self._pending if pending.held is not None]
        holds = torch.stack(held).tolist() if held else [[]] * len(self._pending)
        lines = []
        for pending, loss, norm, norms_held in zip(self._pending, losses, norms, holds, strict=True):
            self._require_finite(pending, loss, norm, norms_held)
            skipped = bool(pending.skipped)
            gradient_norm = None if skipped else norm
            sigmas = [round(sigma, 4) for sigma in pending.sigmas]
            lines.append(LoggedStep(pending.step, loss, gradient_norm, pending.learning_rate, skipped, sigmas))
        self._pending = []
        self.recent.extend(line.loss for line in lines)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(with_checksum(asdict(line))) + "\n" for line in lines)
        for line in lines:
            self._track(line)
        return lines

    def _require_finite(self, pending: PendingStep, loss: float, norm: float, held: Sequence[float]) -> None:
        where = f"at step {pending.step} in {self._dtype_name} (pictures {pending.pictures})"
        for name, its_norm in zip(HELD, held, strict=False):
            if not math.isfinite(its_norm):
                remedy = "type --resume_from_checkpoint latest to go on; if it comes again, lower --learning_rate"
                raise NotFinite(pending, f"the {name} not finite {where}", remedy, self._kept(), False)
        if math.isfinite(loss) and (math.isfinite(norm) or pending.skipped):
            return
        fault = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        cure = (
            "lower --learning_rate"
            if self._dtype_name == "fp32"
            else "type --mixed_precision no, or lower --learning_rate"
        )
        raise NotFinite(pending, f"the {fault} {where}", cure, self._kept(), True)

    def _kept(self) -> str:
        """The last checkpoint, whose steps have all been checked."""
        folders = checkpoint_folders(self._path.parent) if self._path is not None else []
        if not folders:
            return "no weights were written"
        return f"the last good checkpoint is {folders[-1]}, and no weights were written since"

    def cut_back(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run will write again, and damaged ones, which it names.

        The others count in `recent_mean` and as skipped, as they do in a run that was not interrupted.
        """
        if self._path is not None:
            lines = keep_lines(self._path, step)
            losses = (line.get("loss") for line in lines)
            self.recent.extend(loss for loss in losses if isinstance(loss, float))
            skipped = [line.get("skipped") is True for line in lines]
            self.skipped += sum(skipped)
            self.skipped_in_a_row = next((k for k, other in enumerate(reversed(skipped)) if not other), len(skipped))


def keep_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the JSON lines after `step` from a file, and damaged ones, which it names; returns the others' values."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps = [_step_of(line) for line in lines]  # the last is empty, or was cut off by a kill
    damaged = [str(number) for number, read in enumerate(steps[:-1], 1) if read is None]
    if damaged:
        print(f"note: {path} is damaged in line {', '.join(damaged)}, which is left out")
    kept = [line for line, read in zip(lines[:-1], steps, strict=False) if read is not None and read <= step]
    write_text_atomically(path, "".join(line + "\n" for line in kept))
    return [without_checksum(json.loads(line)) for line in kept]


def _step_of(line: str) -> int | None:
    """The step of a line; None where it is damaged."""
    try:
        step = without_checksum(json.loads(line)).get("step")
    except (ValueError, AttributeError):
        return None
    return step if isinstance(step, int) else None
