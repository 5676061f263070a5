"""A LoRA merged into its base's weights: a model's files written again, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.progress import Progress
from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.transformer.lora_files import LoraFile

import torch


def write_merged(lora: LoraFile, scale: float, paths: Sequence[Path], folder: Path) -> None:
    """Writes a model's weight files with the LoRA added, under the same names.

    Each weight is added to in float32, and rounded once to the dtype that it has in the base. All other tensors, and
    the files' headers, are the base's.

    Args:
        lora: what it has of this model, `LoraFile.parts`.
        scale: of what is added.
        paths: the base's files, which together hold each tensor once.
        folder: where the new files go.

    Raises:
        UserError: a weight is quantized.
    """
    with TensorFiles(paths) as base:
        dtypes = base.dtypes()
        for name in lora.layers:
            dtype = dtypes[f"{name}.weight"]
            if dtype not in ("F32", "F16", "BF16"):
                raise UserError(f"{name}.weight of the base is quantized ({dtype}): merge into a base of 16 or 32 bits")
        bar = Progress(total=len(dtypes), desc="tensors")
        with bar:
            for path in paths:
                _write_file(lora, scale, base, path, folder / path.name, bar)


def _write_file(lora: LoraFile, scale: float, base: TensorFiles, source: Path, path: Path, bar: Progress) -> None:
    with source.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with path.open("wb") as file:
        file.write(length + header)
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            tensor = base.tensor(name)
            layer, _, part = name.rpartition(".")
            if layer in lora.layers:
                start = lora.start(layer)
                if part == "weight":
                    tensor = start.added_to(tensor, scale).to(tensor.dtype)
                elif start.bias is not None:
                    tensor = (tensor.float() + scale * start.bias).to(tensor.dtype)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            bar.update()
