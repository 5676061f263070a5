"""Tensors by name in safetensors files, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sd3_lora.common.checksums import with_checksums
from sd3_lora.common.command_line import UserError

import torch
from safetensors import safe_open
from safetensors.torch import save


class TensorFiles:
    """Named tensors spread over safetensors files, read one at a time.

    Args:
        paths: the files; together they hold each tensor once.

    Raises:
        UserError: two files hold a tensor of the same name.
    """

    def __init__(self, paths: Sequence[Path]):
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._opened = {path: _state(path) for path in paths}
        holders: dict[str, Path] = {}
        for path in paths:
            handle = self._stack.enter_context(safe_open(path, "pt"))
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if name in holders:
                    self._stack.close()
                    raise UserError(
                        f"{path.parent} holds {name} twice, in {holders[name].name} and in {path.name}: "
                        "delete the file that is not of this model, or check --variant"
                    )
                self._handles[name], holders[name] = handle, path

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, torch.Size]:
        """Every tensor's shape, from the headers alone."""
        return {name: torch.Size(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}

    def dtypes(self) -> dict[str, str]:
        """Every tensor's dtype as safetensors names it, such as F16, from the headers alone."""
        return {name: handle.get_slice(name).get_dtype() for name, handle in self._handles.items()}

    def require_unchanged(self) -> None:
        """Checks that the files are as they were opened: to read a mapped file that was cut short kills the process.

        Raises:
            UserError: a file was removed or changed.
        """
        for path, state in self._opened.items():
            if _state(path) != state:
                raise UserError(f"{path} was removed or changed while it was read: put it back, and start again")

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, in the file's dtype; it may be a view of the mapped file, so copy what is to be kept."""
        return self._handles[name].get_tensor(name)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix, `(*indices.shape, width)`; only these are read."""
        matrix = self._handles[name].get_slice(name)
        wanted, inverse = indices.unique(return_inverse=True)
        rows = torch.cat([matrix[i : i + 1] for i in wanted.tolist()])
        return rows[inverse]


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose bytes depend on what is in it alone.

    safetensors writes the entries of the metadata in any order, another one in each process: two equal files would
    have other hashes. Here they are sorted. Checksums are added to them (`Checksums`).

    Args:
        path: to write; not atomic.
        tensors: by name, on the CPU.
        metadata: text by name.
    """
    metadata = with_checksums(tensors, metadata)
    content = save(dict(tensors), metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(memoryview(content)[start:])
