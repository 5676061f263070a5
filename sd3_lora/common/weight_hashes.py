"""Weight files known whole: a hash of every byte of their tensors, and whether they are what the hub has.

Files are read once. What was found is noted in the user's cache (`$XDG_CACHE_HOME/sd3_lora`), and holds while a file's
size, time of modification and inode are the same. Rot on a disk leaves these as they were, and a change on purpose does
not: so a note tells them apart, where the file is read again (`python -m sd3_lora.verify`).

Of tensors the hash is made of CRC-32s, which find every single flipped bit and are no protection from whoever means to
deceive; the hub's own is sha256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sd3_lora.common.command_line import UserError, print_in_rank_0, write_text_atomically
from sd3_lora.common.devices import cpu_cores

NOTED_FROM_BYTES = 32 * 1024**2  # a smaller file is read in a moment
_SAID_FROM_BYTES = 2 * 1024**3
_CHUNK_BYTES = 4 * 1024**2
_MOST_THREADS = 4
_CLOCK_TICK_NS = 2 * 10**9  # a file that is written twice within a tick has the same time twice
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUM_MODULUS = 2**256


@dataclass(frozen=True)
class WeightHash:
    """What is known of a safetensors file.

    Attributes:
        tensors: a number below 2**256, of the names, dtypes, shapes and bytes of its tensors. Those of several files
            add up to the same however the tensors are spread over them.
        sha256: of the whole file; None where the hub's is not known.
    """

    tensors: int
    sha256: str | None


def spans(file: BinaryIO) -> tuple[int, dict[str, tuple[str, list[int], int, int]]]:
    """Where a safetensors file's tensors begin, and of each its dtype, shape, begin and end, in their order.

    Raises:
        ValueError: it is not one; or KeyError, TypeError, AttributeError.
    """
    start = 8 + int.from_bytes(file.read(8), "little")
    if start > os.fstat(file.fileno()).st_size:
        raise ValueError("no safetensors file")
    header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return start, {name: (entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in entries}


def whole_hash(paths: Sequence[Path]) -> str | None:
    """A hash of all bytes of all tensors; the same however they are spread over files. None where one is not whole."""
    try:
        hashes = hashes_of(paths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return f"{sum(each.tensors for each in hashes) % _SUM_MODULUS:064x}"


def require_as_on_the_hub(paths: Sequence[Path]) -> None:
    """Checks those files of which the hub's hash is known.

    Raises:
        UserError: one is not what the hub has.
    """
    known = [path for path in paths if hub_sha256(path)]
    for path, each in zip(known, hashes_of(known), strict=True):
        if each.sha256 != hub_sha256(path):
            raise UserError(
                f"{path} is damaged: its sha256 is not the hub's ({hub_sha256(path)}): delete {path.resolve()}, and "
                "type the command again, or download it again"
            )


def hub_sha256(path: Path) -> str | None:
    """The hub's hash of a weight file, from what its download left beside it; None where nothing tells it.

    In the hub's cache a file is a link to a blob, whose name is the hash. A folder of `--local-dir` has it in
    `.cache/huggingface/download`, with the time of the download: a file that was changed after it is no longer the
    hub's.
    """
    if path.is_symlink():
        name = path.readlink().name
        return name if _SHA256.fullmatch(name) else None
    for root in list(path.parents)[:3]:
        record = root / ".cache" / "huggingface" / "download" / f"{path.relative_to(root).as_posix()}.metadata"
        with contextlib.suppress(OSError, ValueError, IndexError):
            _, etag, downloaded = record.read_text(encoding="utf-8").split()[:3]
            if _SHA256.fullmatch(etag) and path.stat().st_mtime <= float(downloaded) + 1:
                return etag
    return None


def hashes_of(paths: Sequence[Path], anew: bool = False) -> list[WeightHash]:
    """What is known of each file; those that are not noted are read, several at a time.

    Args:
        paths: safetensors files.
        anew: whether to read those too that are noted, and to note small ones too. A note that holds stays as it is.

    Raises:
        OSError: a file cannot be read; or what `spans` raises.
    """
    noted = {path: None if anew else noted_hash(path) for path in paths}
    missing = [path for path, known in noted.items() if known is None]
    size = sum(path.stat().st_size for path in missing)
    if size >= _SAID_FROM_BYTES:
        print_in_rank_0(f"reading {size / 1024**3:.1f} GiB of {missing[0].parent} once, to know the weights whole")
    with ThreadPoolExecutor(min(_MOST_THREADS, cpu_cores())) as pool:  # hashing releases the lock
        read = dict(
            zip(missing, pool.map(partial(_read, noted_from=0 if anew else NOTED_FROM_BYTES), missing), strict=True)
        )
    return [noted[path] or read[path] for path in paths]


def noted_hash(path: Path) -> WeightHash | None:
    """What was noted of a file that has been left as it is, by its stamps; None without a note."""
    try:
        note: dict[str, Any] = json.loads(_note_path(path).read_text(encoding="utf-8"))
        if note["stamps"] != _stamps(path):
            return None
        known = WeightHash(int(note["tensors"], 16), note["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if known.sha256 or hub_sha256(path) is None else None


def is_noted_otherwise(path: Path) -> bool:
    """Whether there is a note of a file that has been written since."""
    try:
        return bool(json.loads(_note_path(path).read_text(encoding="utf-8"))["stamps"] != _stamps(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(path: Path, noted_from: int) -> WeightHash:
    started_ns, stamps = time.time_ns(), _stamps(path)
    whole = hashlib.sha256() if hub_sha256(path) else None
    total = 0
    with path.open("rb") as file:
        start, tensors = spans(file)
        file.seek(0)
        _add(file, start, whole)
        for name, (dtype, shape, begin, end) in tensors.items():
            file.seek(start + begin)
            content = f"{name} {dtype} {shape} {_add(file, end - begin, whole):08x}"
            total += int.from_bytes(hashlib.sha256(content.encode()).digest(), "big")
    known = WeightHash(total % _SUM_MODULUS, whole.hexdigest() if whole else None)
    is_settled = stamps[1] < started_ns - _CLOCK_TICK_NS and stamps == _stamps(path)
    if stamps[0] >= noted_from and is_settled and noted_hash(path) is None:
        _write_note(path, stamps, known)
    return known


def _add(file: BinaryIO, size: int, whole: Any) -> int:
    """Reads so many bytes into both hashes; returns the CRC-32.

    Raises:
        ValueError: the file ends before.
    """
    crc = 0
    while size:
        chunk = file.read(min(size, _CHUNK_BYTES))
        if not chunk:
            raise ValueError("the file ends early")
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
        if whole is not None:
            whole.update(chunk)
    return crc


def _stamps(path: Path) -> list[int]:
    """Bytes, nanoseconds of the modification, and inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _note_path(path: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "sd3_lora" / "weights" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _write_note(path: Path, stamps: list[int], known: WeightHash) -> None:
    note = {"path": str(path.resolve()), "stamps": stamps, **asdict(known), "tensors": f"{known.tensors:064x}"}
    with contextlib.suppress(OSError):  # without a note the file is read again the next time
        _note_path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(_note_path(path), json.dumps(note))
