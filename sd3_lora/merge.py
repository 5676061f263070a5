"""A LoRA merged into its base model → a whole model in diffusers' layout, which needs no LoRA any more.

Only what the LoRA changes is written, the transformer and maybe the CLIPs, one tensor in memory at a time; what is
beside it is linked or copied.

    python -m sd3_lora.merge sd3-dreambooth-lora --output_dir merged
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from dataclasses import dataclass, field

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import LoraBaseConfig


@dataclass(frozen=True)
class MergeFlags:
    """Which LoRA, and where the model goes."""

    lora: str = field(metadata={"help": "Folder, file or hub id of a LoRA; the first argument needs no --lora."})
    output_dir: str = field(metadata={"help": "The new model's folder, which must not be there yet."})
    lora_scale: float = field(default=1.0, metadata={"help": "Strength of the LoRA."})
    copy: bool = field(
        default=False,
        metadata={
            "help": "Copy the weights of the text encoders and the VAE. Default: hard links to the base's files where "
            "both are on one disk, which take no space."
        },
    )


COMMAND_LINE = CommandLine("-m sd3_lora.merge", __doc__, (MergeFlags, LoraBaseConfig), first="lora")
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sd3_lora.common.atomic_files import unfinished_path
from sd3_lora.common.command_line import UserError, command, exit_code, require_writable_folder
from sd3_lora.common.disk_room import require_room
from sd3_lora.common.identifier_embedding import embedding_note, embedding_path
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.model_folder import files_beside, take
from sd3_lora.common.run_locks import writing
from sd3_lora.transformer.lora_files import LoraFile, base_of, find_lora, read_lora_file, require_drawable
from sd3_lora.transformer.merged_weights import write_merged


def require_new_folder(folder: Path) -> None:
    """Checks that nothing is replaced.

    Raises:
        UserError: the folder holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give another --output_dir")
    require_writable_folder(folder)


def write_model(lora: LoraFile, scale: float, files: ModelFiles, folder: Path, copies: bool) -> None:
    """Writes the whole model under another name, and renames it; nothing is left of an attempt that failed."""
    written = [path for model in lora.parts for path in files.weight_files(model)]
    kept = [files.folder / name for name in files_beside(files, lora.parts)] if copies else []
    require_room(folder.parent, sum(path.stat().st_size for path in (*written, *kept)), "the merged model takes")
    unfinished = unfinished_path(folder.resolve())
    try:
        for name in files_beside(files, lora.parts):
            take(files.folder / name, unfinished / name, copies)
        for model, part in lora.parts.items():
            write_merged(part, scale, files.weight_files(model), unfinished / model)
        folder.rmdir()  # it is empty
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def run(argv: Sequence[str] | None) -> None:
    """Reads the LoRA, and writes the model."""
    flags, model = COMMAND_LINE.parse(argv)
    path = find_lora(flags.lora)
    files = base_of(path, model)
    lora = read_lora_file(path, files.read_config("transformer"), files.read_config)
    require_drawable([lora], [flags.lora_scale], is_streamed=False)
    folder = Path(flags.output_dir)
    with writing(folder.resolve()):
        require_new_folder(folder)
        write_model(lora, flags.lora_scale, files, folder, flags.copy)
    print(f"wrote {folder}")
    note, embedding = embedding_note(lora.identifier, path), embedding_path(path)
    if note:
        print(note)
    # What drawing reads in a LoRA's file, and no longer finds.
    resolution = lora.record.get("resolution")
    drawing = {
        "prompt": lora.record.get("trigger"),
        "max_sequence_length": lora.record.get("max_sequence_length"),
        "height": resolution,
        "width": resolution,
        "identifier_embedding": embedding if note and embedding.is_file() else None,
    }
    print("next: " + command("inference.py", pretrained_model_name_or_path=folder, variant=model.variant, **drawing))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
