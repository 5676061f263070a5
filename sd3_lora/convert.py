"""Lays out a base in one safetensors file as the folder of a diffusers pipeline, beside the file.

    python -m sd3_lora.convert sd3_medium_incl_clips_t5xxlfp16.safetensors

All scripts then take the file's name as --pretrained_model_name_or_path. Weights keep their dtype, but 8-bit floats
become float16; they are written a gigabyte at a time. What the file lacks is taken from another pipeline, as tokenizers
always are.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from dataclasses import dataclass, field

from sd3_lora.common.command_line import CommandLine

PARTS = "stabilityai/stable-diffusion-3-medium-diffusers"


@dataclass(frozen=True)
class ConvertFlags:
    """Which file, and where what it lacks is."""

    file: str = field(metadata={"help": "The safetensors file; the first argument needs no --file."})
    parts: str = field(
        default=PARTS,
        metadata={
            "help": "Folder or hub id of a diffusers SD3 pipeline, for what the file lacks: at least the tokenizers "
            "and the configurations, of which a few megabytes are downloaded."
        },
    )


COMMAND_LINE = CommandLine("-m sd3_lora.convert", __doc__, (ConvertFlags,), first="file")
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sd3_lora.common.atomic_files import unfinished_path
from sd3_lora.common.command_line import UserError, counted, exit_code, link_or_copy
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.disk_room import require_room
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.common.run_locks import writing
from sd3_lora.common.single_file import ENCODERS, SOURCE_FILE, TRANSFORMER, VAE, SingleFile, converted_folder, source_of


def take_from(parts: ModelFiles, component: str, folder: Path) -> None:
    """Links a component of another pipeline into the folder, or copies it where it cannot be linked."""
    (folder / component).mkdir(parents=True)
    names = [path.name for path in parts.component(component).glob("*") if path.suffix in {".json", ".txt", ".model"}]
    for path in [parts.folder / component / name for name in names] + parts.weight_files(component):
        link_or_copy(path, folder / component / path.name)


def require_same_vocabulary(file: SingleFile, parts: ModelFiles, component: str) -> None:
    """Checks that the other pipeline's tokenizer is that of the file's encoder.

    Raises:
        UserError: they know other numbers of tokens.
    """
    names = ("shared.weight", "encoder.embed_tokens.weight", "text_model.embeddings.token_embedding.weight")
    shapes = [shape for name in names if (shape := file.shape(component, name))]
    known = parts.read_config(component)["vocab_size"]
    if not shapes or shapes[0][0] != known:
        raise UserError(
            f"{parts.name} has tokenizers of another model: its {component} knows {known} tokens, that in {file.path} "
            f"{shapes[0][0] if shapes else 0}: give --parts the pipeline of this model, such as {PARTS}"
        )


def convert(path: Path, parts: ModelFiles) -> Path:
    """Writes the folder; returns its path. Nothing is left where it fails.

    Raises:
        UserError: the file is no SD3, or the other pipeline is of another one.
    """
    file, folder = SingleFile(path), converted_folder(path)
    if folder.exists():
        raise UserError(f"{folder} is there already: delete it to convert {path} again")
    require_room(folder.parent, path.stat().st_size, "its parts take")
    temporary = unfinished_path(folder)
    try:
        for component in (TRANSFORMER, VAE, *ENCODERS):
            if component not in file.components:
                print(f"{component}: from {parts.name}, since the file has none")
                take_from(parts, component, temporary)
                continue
            config = parts.read_config(component)
            if component in ENCODERS:
                require_same_vocabulary(file, parts, component)
            if component == TRANSFORMER:
                config = file.transformer_config(config)
            print(f"{component}: {counted(len(file.components[component]), 'tensor')} of the file")
            file.write(component, temporary / component, config)
        for component in ("scheduler", *(name for name in TEXT_COMPONENTS if name not in ENCODERS)):
            take_from(parts, component, temporary)
        shutil.copyfile(parts.folder / "model_index.json", temporary / "model_index.json")
        (temporary / SOURCE_FILE).write_text(json.dumps(source_of(path)), encoding="utf-8")
        whole = ModelFiles(ModelConfig(str(temporary)))
        for component in (TRANSFORMER, VAE, *ENCODERS):
            whole.component(component)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    (flags,) = COMMAND_LINE.parse(argv)
    path = Path(flags.file)
    if not path.is_file():
        raise UserError(f"there is no file {path}: check the path")
    parts = ModelFiles(ModelConfig(flags.parts))
    with writing(converted_folder(path)):
        folder = convert(path, parts)
    print(f"wrote {folder}: type --pretrained_model_name_or_path {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
