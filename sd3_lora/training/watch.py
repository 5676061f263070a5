"""What looks at a run between its steps, and changes no number of it: loss log, validation pictures, early warning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sd3_lora.common.command_line import counted, first_line
from sd3_lora.common.memory import drop_workspaces, free_memory, only_new_garbage
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.progress import Progress
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.early_warning import EarlyWarning
from sd3_lora.training.flow import load_noise_table
from sd3_lora.training.loss_log import LoggedStep, LossLog
from sd3_lora.training.state import Outputs, Training
from sd3_lora.training.stop_signals import StopSignals
from sd3_lora.training.trackers import Trackers
from sd3_lora.training.trained_parts import lora_kind
from sd3_lora.transformer.compiled import Compiled, uncompiled
from sd3_lora.transformer.velocity import VelocityModel, left_as_found

import torch
from accelerate import Accelerator
from PIL import Image


class DrawnPicture(Protocol):
    """A picture with its prompt."""

    @property
    def prompt(self) -> str: ...

    @property
    def picture(self) -> Image.Image: ...


class Validation(Protocol):
    """What draws while training, as this room knows it: `Validation` of the room `drawing`."""

    @property
    def sheet_path(self) -> Path: ...

    def step_folder(self, step: int) -> Path: ...

    def has_drawn(self, step: int) -> bool: ...

    def write_sheet(self, step: int) -> None: ...

    def draw(
        self, model: VelocityModel, device: torch.device, step: int, stop: Callable[[], bool]
    ) -> Sequence[DrawnPicture]: ...

    def finish(self) -> tuple[int, BaseException] | None: ...


@dataclass(frozen=True)
class Watch:
    """What looks at the run between its steps.

    Attributes:
        log: of the losses.
        trackers: that are sent the pictures.
        validation: draws them, if any are asked for.
        warning: measures at fixed noise, if that is asked for.
        steps_of_epoch: optimizer steps of a pass over the pictures.
        compiled: how the blocks are.
        release: frees what the captured step keeps, until the next one.
        signals: that ask the run to stop.
        marks: steps, and the seconds when the device was through with them.
    """

    log: LossLog
    trackers: Trackers
    validation: Validation | None
    warning: EarlyWarning | None
    steps_of_epoch: float
    compiled: Compiled
    release: Callable[[], None]
    signals: StopSignals
    marks: list[tuple[int, float]] = field(default_factory=list)


def look(training: Training, watch: Watch, draws: bool, measures: bool, accelerator: Accelerator) -> float:
    """Draws validation pictures and measures the early warning's losses on rank 0, while the others wait.

    A failure costs a sentence. The next step has the numbers that it would have had without.

    Args:
        training: whose weights draw.
        watch: what draws and measures.
        draws: whether pictures are due.
        measures: whether the losses are.
        accelerator: of the processes.

    Returns:
        The seconds that it took.
    """
    start = time.perf_counter()
    if (draws or measures) and accelerator.is_main_process:
        works = (measures, measure, "the early warning"), (draws, validate, "the pictures")
        with only_new_garbage():
            watch.release()
            for is_due, work, what in works:
                try:
                    if is_due:
                        with left_as_found(training.transformer), uncompiled(watch.compiled):
                            work(training, watch, accelerator.device)
                except Exception as error:  # whatever it is: the run is worth more
                    note_failure(what, training.step, error)
            drop_workspaces(accelerator.device)
            free_memory(accelerator.device)
    if draws or measures:
        accelerator.wait_for_everyone()
    return time.perf_counter() - start


def note_failure(what: str, step: int, error: BaseException) -> None:
    """Says that something between the steps failed, which stops no run."""
    Progress.write(f"note: {what} of step {step} failed ({first_line(error)}): training goes on")


def finish_pictures(validation: Validation | None) -> None:
    """Waits until the pictures drawn last are written, or says that they are not."""
    failed = validation and validation.finish()
    if failed:
        note_failure("the pictures", *failed)


@contextmanager
def finished_pictures(validation: Validation | None) -> Iterator[None]:
    """At the end of the block all pictures are written, whatever ends it."""
    try:
        yield
    finally:
        finish_pictures(validation)


def validate(training: Training, watch: Watch, device: torch.device) -> None:
    """Draws the validation pictures, with the average where there is one. A signal leaves out those to come."""
    start, validation = time.perf_counter(), watch.validation
    if validation is None:
        return
    if validation.has_drawn(training.step):
        validation.write_sheet(training.step)  # the kill may have come in between
        return
    finish_pictures(validation)
    with training.ready_to_draw():
        drawn = validation.draw(training.model, device, training.step, lambda: watch.signals.received is not None)
    watch.trackers.log_pictures(training.step, [(each.prompt, each.picture) for each in drawn])
    elapsed_s = time.perf_counter() - start
    Progress.write(
        f"step {training.step}: {counted(len(drawn), 'picture')} in {validation.step_folder(training.step)}, "
        f"{elapsed_s:.1f} s; all steps in {validation.sheet_path}"
    )


def measure(training: Training, watch: Watch, device: torch.device) -> None:
    """Measures the early warning's losses, and prints what they warn of."""
    if watch.warning is None or watch.warning.has_measured(training.step):
        return
    for sentence in watch.warning.measure(training.model, device, training.step, watch.log.recent_mean):
        Progress.write(sentence)
    last = watch.warning.history[-1]
    values = {"subject_loss": last.subject_loss, "class_loss": last.class_loss}
    watch.trackers.log(training.step, {name: value for name, value in values.items() if value is not None})


def mean_step_ms(marks: Sequence[tuple[int, float]]) -> float | None:
    """The milliseconds of a step, without the first ones where there are more: those load, compile and capture.

    None where there was no step.

    Args:
        marks: steps, and the seconds when the device was through with them.
    """
    if len(marks) == 1:
        return None
    (first_step, first_s), (last_step, last_s) = marks[1 if len(marks) > 2 else 0], marks[-1]
    return 1000 * (last_s - first_s) / (last_step - first_step)


def open_log(outputs: Outputs, step: int, trackers: Trackers, accelerator: Accelerator) -> LossLog:
    """The loss log, without the lines after this step, which will be written again."""
    path = outputs.folder / "losses.jsonl" if accelerator.is_main_process else None

    def track(line: LoggedStep) -> None:
        trackers.log(line.step, {"loss": line.loss, "learning_rate": line.learning_rate})

    log = LossLog(path, lambda losses: accelerator.reduce(losses, "mean"), outputs.record.facts.precision, track)
    log.cut_back(step)
    return log


def make_early_warning(
    flags: TrainingFlags, data: TrainingData, files: ModelFiles, step: int, say: Callable[[str], None]
) -> EarlyWarning | None:
    """What measures at fixed noise while training, if that is asked for; goes on from what it measured before."""
    if flags.watch.early_warning_steps is None:
        return None
    class_prompt = data.class_prompt(flags.prior.class_prompt)
    if class_prompt is None:
        say("note: stage one has embedded no class prompt (compute_embeddings.py --class_prompt): no drift is measured")
    elif flags.trains_all or lora_kind(flags.lora).starts_from_weights:
        what = "--full" if flags.trains_all else f"--init_lora_weights {flags.lora.init_lora_weights}"
        say(f"note: {what} changes the base itself: no drift is measured")
        class_prompt = None
    warning = EarlyWarning(
        data,
        load_noise_table(files.read_scheduler_config(), flags.flow.timestep_shift),
        files.read_config("vae"),
        flags.run.train_batch_size * flags.prior.pools,
        class_prompt,
        Path(flags.run.output_dir) / "early_warning.jsonl",
        flags.prior.more,
    )
    warning.go_on_from(step)
    say(warning.sentence())
    return warning
