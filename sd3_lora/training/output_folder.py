"""The folder that a run writes to: its lock, room for what will come, and what is kept where the disk takes no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sd3_lora.common.command_line import UserError, counted, disk_fault, host_memory_fault
from sd3_lora.common.disk_room import require_room
from sd3_lora.common.memory import GIB, free_disk_bytes
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.run_locks import writing_in
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.in_backward import whole_bytes
from sd3_lora.training.state import Outputs, Training
from sd3_lora.transformer.base_weights import base_bytes

import torch
from accelerate import Accelerator
from safetensors import SafetensorError


def lock_outputs(output_dir: Path, accelerator: Accelerator, locks: ExitStack) -> None:
    """Keeps other runs out of the output folder, and deletes what killed ones left unfinished there.

    Raises:
        UserError: another run trains there, or the folder cannot be written.
    """
    if accelerator.is_main_process:
        refusal = f"another run is training in {output_dir}: wait for its end, or give another --output_dir"
        locks.enter_context(writing_in(output_dir, refusal))
    accelerator.wait_for_everyone()


def require_room_for_model(flags: TrainingFlags, files: ModelFiles, dtype: torch.dtype) -> None:
    """Checks where a whole model is to go.

    Raises:
        UserError: its folder is the base's, or there is no room for it and its checkpoints.
    """
    folder = Path(flags.run.output_dir)
    if folder.resolve() == files.folder.resolve():
        raise UserError(f"--output_dir {folder} is the model that is trained, which --full would replace: give another")
    weights = base_bytes(files, dtype)
    moments = whole_bytes(files.tensor_shapes("transformer"), dtype, window=1, device=torch.device("cpu"))
    kept = flags.run.checkpoints_total_limit or 1
    needed, free = (kept + 1) * (weights + moments), free_disk_bytes(folder)
    if free < needed:
        raise UserError(
            f"{folder} has {free / GIB:.1f} GiB of disk left, and --full writes up to {needed / GIB:.1f} GiB there "
            f"({counted(kept + 1, 'checkpoint')} for a moment): make room, or give another --output_dir"
        )


def require_room_for_checkpoints(flags: TrainingFlags, training: Training) -> None:
    """Checks that there is room for what the run will write of its LoRA. Of a whole model that is known before.

    Raises:
        UserError: there is not.
    """
    if training.in_backward:
        return
    run, average = flags.run, 2 if training.average else 1
    left = training.steps - training.step
    checkpoints = -(-left // run.steps_to_checkpoint(training.steps))
    if run.checkpoints_total_limit is not None:
        checkpoints = min(checkpoints, run.checkpoints_total_limit + 1)  # one more for a moment
    loras = checkpoints + 1 + (left // flags.watch.save_every_n_steps if flags.watch.save_every_n_steps else 0)
    trained = sum(tensor.nbytes for tensor in training.trainables.parameters)
    state = trained * average + 2 * trained  # the optimizer's, at the most
    lora = 4 * training.trainables.numel * average
    folder = Path(run.output_dir)
    require_room(folder, checkpoints * state + loras * lora, f"{counted(checkpoints, 'checkpoint')} and the LoRA take")


@contextmanager
def named_disk_faults(outputs: Outputs) -> Iterator[None]:
    """Has the sentence about a disk that takes no more, or a host without memory, say what is kept, and how to go on.

    Raises:
        UserError: the block could not write.
    """
    try:
        yield
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        fault = disk_fault(error) or host_memory_fault(error)
        if fault is None:
            raise
        raise UserError(f"{fault}; {outputs.kept()}") from None
