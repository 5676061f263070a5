"""Checksums of what a file of ours holds, in its own metadata: rot on a disk is noticed where the file is read.

A CRC-32 finds every single flipped bit at 1.3 GiB/s on one core; it is no protection from whoever means to deceive.
Files of earlier builds and of other programs have no checksums, and are read as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch

CHECKSUMS_KEY = "sd3_lora_checksums"  # of a safetensors file's metadata
CHECKSUM_FIELD = "checksum"  # of a JSON object


class DamagedError(ValueError):
    """What was read is not what was written."""


def checksum(content: bytes) -> str:
    """CRC-32, as eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def tensor_checksum(name: str, tensor: torch.Tensor) -> str:
    """Of a tensor's name, dtype, shape and bytes; the tensor is on the CPU."""
    start = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(values, start):08x}"


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object as it will be read, with one field more: the checksum of the others.

    Args:
        values: by name; what JSON cannot hold becomes text.
    """
    plain = json.loads(json.dumps({k: v for k, v in values.items() if k != CHECKSUM_FIELD}, default=str))
    return {**plain, CHECKSUM_FIELD: checksum(json.dumps(plain).encode())}


def without_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `with_checksum` was given; an object of an earlier build, which has no checksum, as it is.

    Raises:
        DamagedError: it is not what was written.
    """
    plain = {name: value for name, value in values.items() if name != CHECKSUM_FIELD}
    if values.get(CHECKSUM_FIELD, checked := checksum(json.dumps(plain).encode())) != checked:
        raise DamagedError("it has another checksum than when it was written")
    return plain


def with_checksums(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], beside: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The metadata of a safetensors file, with one entry more: the checksums of tensors and of the other entries.

    Args:
        tensors: by name, on the CPU, as they will be written.
        metadata: text by name.
        beside: checksums of what lies beside the file, by name.
    """
    sums = {
        "metadata": {key: checksum(text.encode()) for key, text in sorted(metadata.items())},
        "names": checksum("\n".join(sorted(tensors)).encode()),
        "tensors": [tensor_checksum(name, tensors[name]) for name in sorted(tensors)],
        **({"beside": dict(beside)} if beside else {}),
    }
    return {**metadata, CHECKSUMS_KEY: json.dumps(sums, separators=(",", ":"))}


class Checksums:
    """The checksums of an open safetensors file; none in a file without them.

    Entries that another program has added to the metadata are not looked at.

    Args:
        handle: of `safe_open`.

    Attributes:
        beside: of what lay beside the file when it was written, by name.

    Raises:
        DamagedError: its metadata, or the names of its tensors, are not those that were written.
    """

    def __init__(self, handle: Any):
        metadata = handle.metadata() or {}
        self._tensors: dict[str, str] = {}
        self.beside: dict[str, str] = {}
        if CHECKSUMS_KEY not in metadata:
            return
        try:
            sums = json.loads(metadata[CHECKSUMS_KEY])
            known = {key: checksum(metadata[key].encode()) for key in sums["metadata"]}
            names = sorted(handle.keys())
            same = known == sums["metadata"] and checksum("\n".join(names).encode()) == sums["names"]
            self.beside = dict(sums.get("beside", {}))
            self._tensors = dict(zip(names, sums["tensors"], strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError("its header has another checksum than when it was written") from error
        if not same:
            raise DamagedError("its header has another checksum than when it was written")

    def require(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which was read from the file whole.

        Raises:
            DamagedError: it is not what was written.
        """
        if self._tensors and self._tensors[name] != tensor_checksum(name, tensor):
            raise DamagedError(f"its tensor {name} has another checksum than when it was written")
        return tensor

    def require_all(self, handle: Any) -> None:
        """Reads every tensor, where the file has checksums.

        Raises:
            DamagedError: one is not what was written.
        """
        for name in self._tensors:
            self.require(name, handle.get_tensor(name))
