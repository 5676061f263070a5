"""Reads all weights of a base model, and says whether each file is what it was.

Files of the hub are compared with the hub's own hashes. Others are compared with what was noted when they were first
read: a file that nobody has written since, and that is another all the same, has rotted on the disk.

    python -m sd3_lora.verify stable-diffusion-3.5-medium
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import ModelConfig

COMMAND_LINE = CommandLine("-m sd3_lora.verify", __doc__, (ModelConfig,), first="pretrained_model_name_or_path")
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd3_lora.common.command_line import UserError, counted, exit_code
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.weight_hashes import hashes_of, hub_sha256, is_noted_otherwise, noted_hash


def verified(paths: Sequence[Path]) -> Iterator[tuple[Path, str | None, str]]:
    """Reads files; of each yields its path, what is wrong with it if anything, and by what it is known."""
    noted = [noted_hash(path) for path in paths]
    changed = [is_noted_otherwise(path) for path in paths]
    for path, before, is_changed, now in zip(paths, noted, changed, hashes_of(paths, anew=True), strict=True):
        hub = hub_sha256(path)
        if hub and now.sha256 != hub:
            yield path, "is damaged (its sha256 is not the hub's)", "the hub's hash"
        elif before and before.tensors != now.tensors:
            yield path, "has rotted on the disk (nobody wrote it since it was first read, and it is another)", "a note"
        elif hub:
            yield path, None, "as on the hub"
        elif before:
            yield path, None, "as when it was first read"
        else:
            yield path, None, "changed since it was first read" if is_changed else "read for the first time"


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    (model,) = COMMAND_LINE.parse(argv)
    files = ModelFiles(model)
    faults, count, size = list[str](), 0, 0
    for name in files.components():
        if name.startswith(("tokenizer", "scheduler")):
            continue
        try:
            files.component(name)
        except UserError as error:
            faults.append(str(error))
            continue
        for path, fault, known in verified(files.weight_files(name)):
            print(f"{path}: {fault or known}")
            count, size = count + 1, size + path.stat().st_size
            if fault:
                faults.append(f"{path} {fault}: delete {path.resolve()} and download it again")
    if faults:
        more = f" ({counted(len(faults) - 1, 'more fault')} above)" if len(faults) > 1 else ""
        for fault in faults[1:]:
            print(fault)
        raise UserError(faults[0] + more)
    print(f"{counted(count, 'file')} of {files.name}, {size / GIB:.2f} GiB: whole and sound")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
