"""LoRAs merged into their base's weights: in a transformer that is loaded to draw, or in files that are written again.

Either way a weight is added to in float32, and rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.progress import Progress
from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.transformer.lora import LayerStart
from sd3_lora.transformer.lora_files import LoraFile

import torch
from diffusers import SD3Transformer2DModel

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in safetensors


class MergedLoras:
    """LoRAs in the weights of a transformer. Their strengths may change at any time, and the base's bits come back.

    Nothing of the base is kept meanwhile: it is in its files. While a layer changes, the device holds a few copies of
    its weight in float32 (`LoraFile.merging_bytes`).

    Args:
        transformer: as it was loaded, without adapters; streamed matrices are in the host's memory.
        loras: of this transformer.
        paths: the files that it was loaded from.
        device: that computes.
        changed: is called when weights have changed, such as `StreamedBlocks.forget`.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        loras: Sequence[LoraFile],
        paths: Sequence[Path],
        device: torch.device,
        changed: Callable[[], None] = lambda: None,
    ):
        self._transformer, self._loras, self._paths = transformer, loras, paths
        self._device, self._changed = device, changed
        self._used: tuple[float, ...] = ()  # the strengths that are in the weights: none yet

    @torch.no_grad()
    def use(self, scales: Sequence[float] | None) -> None:
        """Gives each LoRA its strength; None for the base alone."""
        wanted = tuple(scales or ())
        if not any(wanted):
            wanted = ()
        if wanted == self._used:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # nothing computes with the weights, nor copies them
        with TensorFiles(self._paths) as base:
            dtypes = base.dtypes()
            for name in dict.fromkeys(name for lora in self._loras for name in lora.layers):
                self._merge_layer(name, wanted, base, dtypes)
        self._used = wanted
        self._changed()

    def _merge_layer(self, name: str, scales: tuple[float, ...], base: TensorFiles, dtypes: Mapping[str, str]) -> None:
        of_layer = zip(self._loras, scales, strict=bool(scales))
        starts = [(lora.start(name).to(self._device), scale) for lora, scale in of_layer if name in lora.layers]
        for part, parameter in self._transformer.get_submodule(name).named_parameters(recurse=False):
            if part == "bias" and not any(lora.has_biases for lora in self._loras):
                continue
            # What is there is the base's, unless it was merged before, or rounded when it was loaded.
            is_base = not self._used and _NAMES[parameter.dtype] == dtypes[f"{name}.{part}"]
            plain = parameter.data if is_base else base.tensor(f"{name}.{part}")
            parameter.copy_(with_loras(plain.to(self._device), part, starts))


def with_loras(plain: torch.Tensor, part: str, starts: Sequence[tuple[LayerStart, float]]) -> torch.Tensor:
    """A layer's weight or bias with LoRAs in it, in float32; as it is where there is none.

    Args:
        plain: `(out, in)` or `(out,)`.
        part: weight or bias.
        starts: each LoRA of the layer, with its strength.
    """
    for start, scale in starts:
        if part == "weight":
            plain = start.added_to(plain, scale)
        elif start.bias is not None:
            plain = plain.float() + scale * start.bias
    return plain


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
            if dtype not in _NAMES.values():
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
                tensor = with_loras(tensor, part, [(lora.start(layer), scale)]).to(tensor.dtype)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            bar.update()
