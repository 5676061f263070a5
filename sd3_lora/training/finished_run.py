"""A finished run: what is written beside its weights for other programs, and the commands that draw with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sd3_lora.common.command_line import UserError, command, counted, disk_fault
from sd3_lora.common.defaults import EMBEDDINGS_PATH, MINIATURE_GUIDANCE
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.optimizer_flags import ENDING_SCHEDULES
from sd3_lora.training.state import Outputs, Training
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE
from sd3_lora.transformer.lora_exports import export_lora, export_path
from sd3_lora.transformer.lora_files import read_lora_file

from accelerate import Accelerator


def write_model(outputs: Outputs, training: Training) -> None:
    """Makes the output folder a whole model, where its transformer was trained. A failure costs a sentence."""
    if not training.in_backward:
        return
    try:
        outputs.write_whole_model()
        print(f"wrote {outputs.folder}, a whole model: what is beside its transformer is the base's")
    except (UserError, OSError) as error:
        if disk_fault(error):
            raise
        print(f"note: {outputs.trained_path} is written, and not what a whole model has beside it ({error})")


def write_exports(folder: Path, flags: TrainingFlags, files: ModelFiles) -> None:
    """Writes the LoRA, and its moving average if there is one, in the names of other programs."""
    for name in (LORA_FILE, EMA_FILE) if flags.average.use_ema else (LORA_FILE,):
        for form in flags.run.exports:
            path = export_path(folder / name, form)
            lora = read_lora_file(folder / name, files.read_config("transformer"), files.read_config)
            export_lora(lora, form, path, files)
            print(f"wrote {path}")


def next_commands(outputs: Outputs, flags: TrainingFlags) -> Iterator[str]:
    """The commands that draw with what was trained, for the user."""
    record = outputs.record
    prompt = record.facts.trigger or ""
    if len(record.facts.prompts or ()) == 1:  # a caption says already where its picture was taken
        prompt += " in a forest"
    embeddings_path = None if flags.data.data_df_path == EMBEDDINGS_PATH else flags.data.data_df_path
    shared = {**flags.model.flags(), **flags.device.flags(), **flags.budget.flags()}

    guidance = MINIATURE_GUIDANCE if flags.model.is_bundled else None
    if flags.trains_all:
        facts, size = record.facts, dict.fromkeys(("height", "width"), record.facts.resolution)
        shared |= {"pretrained_model_name_or_path": outputs.folder, "max_sequence_length": facts.max_sequence_length}
        settings = {"prompt": prompt, "data_df_path": embeddings_path, "guidance": guidance}
        yield "next: " + command("inference.py", **shared, **size, **settings)
        return

    def drawing(lora: Path) -> str:
        settings = {"lora": lora, "prompt": prompt, "data_df_path": embeddings_path, "guidance": guidance}
        return command("inference.py", **shared, **settings)

    yield "next: " + drawing(outputs.folder)
    if flags.average.use_ema:
        yield "with the moving average: " + drawing(outputs.folder / EMA_FILE)


def say_nothing_to_do(outputs: Outputs, training: Training, accelerator: Accelerator) -> None:
    """For a run that was resumed past its last step, and has written all that it writes."""
    schedule = outputs.record.identity.values["--lr_scheduler"]
    ends = f"--lr_scheduler {schedule} has come to its end"
    longer = ends if schedule in ENDING_SCHEDULES else "a larger --max_train_steps goes on from here"
    asked = f"{counted(training.steps, 'step')} {'was' if training.steps == 1 else 'were'} asked for"
    accelerator.print(f"nothing to do: {asked}; {longer}")
