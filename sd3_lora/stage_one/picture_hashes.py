"""The identity of pictures: the sha256 of their bytes. A large folder's are noted, so as not to read it all each time.

A note holds while the file's size and its times of modification and of change are what they were. Nobody can set the
latter, so that a file copied over another with its old date does not pass for it. (On Windows it is the time of
creation, and the size and the time of modification must do.)
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import write_text_atomically
from sd3_lora.common.devices import cpu_cores
from sd3_lora.stage_one.images import hash_file

from tqdm import tqdm

NOTES_NAME = "pictures.json"  # beside the latents of these pictures
NOTED_FROM_BYTES = 256 * 1024**2  # a smaller folder is read in a second
MOST_THREADS = 16
# A file that is written twice within a tick of its file system's clock has the same times twice.
_SETTLED_NS = 2 * 10**9
Times = tuple[int, int, int]  # bytes, and nanoseconds of the modification and of the change


def hash_pictures(paths: Sequence[Path], notes_path: Path | None = None) -> list[str]:
    """The sha256 of each file, hexadecimal.

    Args:
        paths: the files.
        notes_path: where what is read now is noted; None to read all and note nothing.

    Raises:
        UserError: a file cannot be read.
    """
    started_ns = time.time_ns()
    names = [os.path.abspath(path) for path in paths]
    times = [_times(path) for path in paths]
    notes = _read_notes(notes_path) if notes_path else {}
    known = {
        name: notes[name][1]
        for name, found in zip(names, times, strict=True)
        if name in notes and notes[name][0] == found
    }
    missing = [path for name, path in zip(names, paths, strict=True) if name not in known]
    is_large = sum(size for size, *_ in times) >= NOTED_FROM_BYTES
    with ThreadPoolExecutor(min(MOST_THREADS, cpu_cores())) as pool:  # hashing releases the lock
        hashes = (pool.map if is_large else map)(hash_file, missing)  # to hand out tiny files takes longer than they do
        read = tqdm(hashes, total=len(missing), desc="hashing", leave=False, disable=len(missing) < 100)
        known |= zip((os.path.abspath(path) for path in missing), read, strict=True)
    if notes_path and missing and is_large:
        settled = {
            name: (*found, known[name])
            for name, found in zip(names, times, strict=True)
            if max(found[1:]) < started_ns - _SETTLED_NS
        }
        with contextlib.suppress(OSError):  # a folder that cannot be written is read anew each time
            notes_path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(notes_path, json.dumps(settled))
    return [known[name] for name in names]


def _times(path: Path) -> Times:
    try:
        status = path.stat()
    except OSError:  # who reads it says so
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_notes(path: Path) -> dict[str, tuple[Times, str]]:
    """By absolute path, the times of a file and its hash; none where the notes are not whole."""
    try:
        notes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {name: ((size, modified, changed), found) for name, (size, modified, changed, found) in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
