"""The command line: flags from dataclasses, and one sentence for an error that a user can cause."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Something that the user can mend: one sentence saying what is wrong and what to type."""


class _Parser(HfArgumentParser):
    """argparse's own error, but in the one-sentence form that all the errors of the scripts have."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: `python {self.prog} --help` lists the flags")


def parse_flags(
    groups: Sequence[type],
    argv: Sequence[str] | None,
    script: str,
    description: str,
    refused: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """Parses `argv` into one instance of each dataclass in `groups`.

    Args:
        groups: frozen dataclasses whose field metadata holds the help text.
        argv: the arguments; None means those of the process.
        script: the file name that the user typed.
        description: the first line of `--help`.
        refused: flags that diffusers' scripts know and this one does not have, each with what to do instead.

    Raises:
        UserError: an unknown, refused or malformed flag, or a value that a dataclass rejects.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in argv:
        flag = word.split("=", 1)[0].replace("-", "_").lstrip("_")
        if word.startswith("--") and flag in (refused or {}):
            raise UserError(f"--{flag} is not part of {script}: {(refused or {})[flag]}")
    parser = _Parser(list(groups), prog=script, description=description, allow_abbrev=False)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args=argv, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # raised by a dataclass' own __post_init__
        raise UserError(str(error)) from error
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    return tuple(parsed)


def exit_code(script: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, smaller: str = "") -> int:
    """Runs a script's body and turns an error that the user can mend into its sentence on stderr and exit code 2.

    Args:
        script: the body.
        argv: its arguments.
        smaller: the flags to try when the GPU's memory runs out.
    """
    # Here, because flags are parsed before anything as heavy is imported.
    import torch
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    # A bar for each file that loads in milliseconds would bury what the scripts say.
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A Windows console of another code page must not turn a prompt into a crash.
            stream.reconfigure(errors="replace")
    try:
        script(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except torch.OutOfMemoryError as error:
        what = ". ".join(str(error).split(". ")[:2])  # "CUDA out of memory. Tried to allocate 2.00 GiB"
        print(f"error: {what}: try {smaller}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (OSError, SafetensorError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        print("error: the disk is full: free some space and type the same command again", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def command(script: str, **flags: Any) -> str:
    """The command line that a message asks the user to type; None and False values are left out.

    >>> command("inference.py", lora="my lora", num_images=2)
    "python inference.py --lora 'my lora' --num_images 2"
    """
    words = ["python", script]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def require_writable_folder(folder: Path) -> None:
    """Makes `folder` and tries to write in it, so that hours of work do not end in a refusal.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): give another folder") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 to a temporary name beside `path` and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_run(path: Path, configs: Sequence[Any], stages: Sequence[Any], **results: Any) -> None:
    """Saves the resolved flags, what each stage took, and what was written, as JSON beside the output."""
    flags: dict[str, Any] = {}
    for config in configs:
        flags.update(asdict(config))
    content = {"flags": flags, "stages": [asdict(stage) for stage in stages], **results}
    write_text_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def read_text_lines(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file; a BOM and Windows' line ends are tolerated.

    Raises:
        UserError: the file is missing or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it again as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
