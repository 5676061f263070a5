"""A report of a training run, as one HTML file in its folder: at the end of the run, or while it goes on.

It reads what lies in the folder and changes nothing else. The file asks nothing of a network.

    python -m sd3_lora.report sd3-dreambooth-lora
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.defaults import LORA_FOLDER


@dataclass(frozen=True)
class ReportConfig:
    """Which run."""

    output_dir: str = field(
        default=LORA_FOLDER, metadata={"help": "The folder of a run, finished or not; the first argument may name it."}
    )


COMMAND_LINE = CommandLine("-m sd3_lora.report", __doc__, (ReportConfig,), first="output_dir")
if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # tokenizers that are not here are not fetched for a report
    COMMAND_LINE.answer_at_once()

import sys
from pathlib import Path

from sd3_lora.common.command_line import UserError, exit_code
from sd3_lora.reporting.page import write_report


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    (config,) = COMMAND_LINE.parse(argv)
    try:
        path = write_report(Path(config.output_dir))
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read or written: change its permissions") from error
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB: open it in a browser")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
