"""A trained LoRA → the same LoRA in the names of other programs.

Two formats: kohya for sd-scripts, Forge and ComfyUI; a1111 for A1111. docs/loras.md says which file goes where.

    python -m sd3_lora.export sd3-dreambooth-lora --format kohya
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from dataclasses import dataclass, field

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import ExportFormat, LoraBaseConfig


@dataclass(frozen=True)
class ExportFlags:
    """Which LoRA, and what becomes of it."""

    lora: str = field(metadata={"help": "Folder, file or hub id of a LoRA; the first argument needs no --lora."})
    format: ExportFormat = field(
        default="kohya", metadata={"help": "kohya for sd-scripts, Forge and ComfyUI; a1111 for A1111."}
    )
    output: str | None = field(
        default=None, metadata={"help": "The file to write. Default: beside the LoRA, with the format in its name."}
    )


COMMAND_LINE = CommandLine("-m sd3_lora.export", __doc__, (ExportFlags, LoraBaseConfig), first="lora")
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()

import sys
from collections.abc import Sequence
from pathlib import Path

from sd3_lora.common.command_line import exit_code
from sd3_lora.common.identifier_embedding import embedding_note
from sd3_lora.common.run_locks import writing
from sd3_lora.transformer.lora_exports import export_lora, export_path
from sd3_lora.transformer.lora_files import base_of, find_lora, read_lora_file


def run(argv: Sequence[str] | None) -> None:
    """Reads the LoRA and writes its export."""
    flags, model = COMMAND_LINE.parse(argv)
    path = find_lora(flags.lora)
    files = base_of(path, model)
    lora = read_lora_file(path, files.read_config("transformer"), files.read_config)
    output = Path(flags.output) if flags.output else export_path(path, flags.format)
    with writing(output):
        export_lora(lora, flags.format, output, files)
    print(f"wrote {output}")
    note = embedding_note(lora.identifier, path)
    if note:
        print(note)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
