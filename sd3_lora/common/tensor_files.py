"""Tensors by name in safetensors files, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sd3_lora.common.checksums import Checksums, with_checksums
from sd3_lora.common.command_line import UserError

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

SHARD_BYTES = 10**9


class TensorFiles:
    """Named tensors spread over safetensors files, read one at a time.

    Args:
        paths: the files; together they hold each tensor once.
        checked: whether what is read is compared with the files' checksums, where they have some.

    Raises:
        UserError: two files hold a tensor of the same name.
        DamagedError: a file that is checked has another header than was written.
    """

    def __init__(self, paths: Sequence[Path], checked: bool = False):
        self._handles: dict[str, Any] = {}
        self._sums: dict[str, Checksums] = {}
        self._opened = {path: _state(path) for path in paths}
        holders: dict[str, Path] = {}
        with ExitStack() as stack:
            for path in paths:
                handle = stack.enter_context(safe_open(path, "pt"))
                names = list(handle.keys())
                for name in names:
                    if name in holders:
                        raise UserError(
                            f"{path.parent} holds {name} twice, in {holders[name].name} and in {path.name}: "
                            "delete the file that is not of this model, or check --variant"
                        )
                    self._handles[name], holders[name] = handle, path
                if checked:
                    self._sums |= dict.fromkeys(names, Checksums(handle))
            self._stack = stack.pop_all()

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
        """The whole tensor, in the file's dtype; it may be a view of the mapped file, so copy what is to be kept.

        Raises:
            DamagedError: it is checked, and not what was written.
        """
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return self._sums[name].require(name, tensor) if name in self._sums else tensor

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


def write_shards(folder: Path, pattern: str, tensors: Mapping[str, torch.Tensor]) -> list[Path]:
    """Writes tensors of any device as safetensors files of about a gigabyte, with an index where there are several.

    No more than one file's tensors are on the host at a time. Each file is read back and compared.

    Args:
        folder: for the files, which is made; not atomic.
        pattern: of their names, such as `model{suffix}.safetensors`.
        tensors: by name; none may share memory with another.

    Raises:
        UserError: a number is not finite.
        OSError: what was read back is not what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    for file_name, names in split.filename_to_tensors.items():
        on_host = {name: tensors[name].detach().cpu().contiguous() for name in names}
        for name, tensor in on_host.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"{name} has a NaN or infinity: not saved; lower --learning_rate and train again")
        path = folder / file_name
        write_tensors(path, on_host, {"format": "pt"})
        with TensorFiles([path]) as written:
            if any(not torch.equal(written.tensor(name), tensor) for name, tensor in on_host.items()):
                raise OSError(f"{path}: the disk returned other bytes than were written")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        name = pattern.replace("{suffix}", "") + ".index"
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return [folder / name for name in split.filename_to_tensors]


@torch.no_grad()
def read_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Reads what `write_shards` wrote into tensors of the same shapes and dtypes, one at a time.

    Raises:
        UserError: a file or a tensor is missing, is damaged, or does not fit.
    """
    paths = sorted(folder.glob("*.safetensors"))
    try:
        with TensorFiles(paths, checked=True) as files:
            for name, tensor in tensors.items():
                value = files.tensor(name)
                if value.shape != tensor.shape or value.dtype != tensor.dtype:
                    raise ValueError(f"{name} has another shape or dtype")
                if value.is_floating_point() and not value.isfinite().all():
                    raise ValueError(f"{name} has a NaN or infinity")
                tensor.copy_(value)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not whole ({error}): give an earlier checkpoint to --resume_from_checkpoint, or another "
            "--output_dir for a new run"
        ) from error
