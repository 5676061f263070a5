"""Windows' rule for files in use, on Linux: who renames, replaces or deletes one gets a PermissionError."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def in_use(path: Path) -> list[str]:
    """The files at or below `path` that this process has open or mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    used = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    for number in os.listdir("/proc/self/fd"):
        try:
            used.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the one of the list itself
            continue
    name = os.path.realpath(path)
    return sorted(file for file in used if file == name or file.startswith(name + os.sep))


def forbid_files_in_use(patch: pytest.MonkeyPatch) -> None:
    """Has `os.replace`, `os.rename`, `os.unlink` and all that is built on them refuse files in use."""

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **settings: Any) -> Any:
            for path in paths:
                if files := in_use(Path(os.fsdecode(path))):
                    raise PermissionError(errno.EACCES, "the file is in use by another process", files[0])
            return original(*paths, **settings)

        return call

    for name in ("replace", "rename", "unlink", "remove"):
        patch.setattr(os, name, guarded(getattr(os, name)))
    patch.setattr(shutil, "_use_fd_functions", False)  # rmtree then gives whole paths, as on Windows
