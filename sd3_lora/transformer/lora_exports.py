"""A LoRA in kohya's names, for programs that know the original SD3: sd-scripts, ComfyUI, Forge, A1111.

Layers that are joined there (q, k, v) have one LoRA, whose `lora_up` is block-diagonal: with ranks r of the parts,
`lora_down (sum of r, in)` and `lora_up (3 * out, sum of r)`. Parts that are not trained are zero.

The strength is folded into `lora_up`, so `.alpha` is the number of `lora_down`'s rows. sd-scripts fails without one;
A1111 cuts a key at its last two dots and fails at `name.alpha`, so its format has none, and is read at strength 1.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, quoted
from sd3_lora.common.config import LoraType
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.tensor_files import TensorFiles, write_tensors
from sd3_lora.transformer.lora import METADATA_KEY, LayerStart
from sd3_lora.transformer.lora_files import DORA_OF_BASE, TYPE_NAMES, LoraFile
from sd3_lora.transformer.lora_keys import layer_widths
from sd3_lora.transformer.original_layers import OriginalPlace, original_places

import torch

_PREFIX = "lora_unet_"


@dataclass(frozen=True)
class _JoinedLayer:
    """The LoRA of one layer of the original: `(rows, in)`, `(out, rows)`, and of a DoRA `(out, 1)`."""

    down: torch.Tensor
    up: torch.Tensor
    dora_scale: torch.Tensor | None


def export_path(path: Path, form: str) -> Path:
    """Where a LoRA's export goes unless another place is named: beside it."""
    return path.with_name(f"{path.stem}_{form}.safetensors")


def require_exportable(path: Path, type_: LoraType, is_dora: bool, form: str) -> None:
    """Checks that a format can hold a LoRA.

    Args:
        path: of the LoRA, or where it will be.
        type_: of the LoRA.
        is_dora: whether it is a DoRA.
        form: the format.

    Raises:
        UserError: it cannot.
    """
    if type_ != "lora":
        raise UserError(
            f"a {TYPE_NAMES[type_]} has no form in {form}, where q, k and v are one layer: draw with {path} in ComfyUI "
            f"as it is; {_merge(path)}"
        )
    if is_dora and form == "a1111":
        raise UserError(f"A1111 reads no DoRA: leave out a1111; {_merge(path)}")


def _merge(path: Path) -> str:
    command = quoted(["python", "-m", "sd3_lora.merge", str(path), "--output_dir", "merged"])
    return f"`{command}` makes a whole model of it and its base"


def export_lora(lora: LoraFile, form: str, path: Path, files: ModelFiles) -> None:
    """Writes a LoRA in kohya's names, float32, atomically.

    Args:
        lora: of any format that is read here.
        form: kohya or a1111.
        path: to write.
        files: of its base, whose weights are read for a DoRA alone.

    Raises:
        UserError: the format cannot hold it.
    """
    require_exportable(lora.path, lora.type, lora.is_dora, form)
    if lora.scales_inputs or lora.has_biases:
        of = "magnitudes of the layers' inputs" if lora.scales_inputs else "biases"
        raise UserError(f"{lora.path} has {of}, which are not exported: {_merge(lora.path)}")
    config = files.read_config("transformer")
    if lora.is_dora:
        files.component("transformer")
    with TensorFiles(files.weight_files("transformer") if lora.is_dora else ()) as base:
        layers = _joined(lora.starts(), original_places(layer_widths(config)), base)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        key = _PREFIX + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        if form == "kohya":
            tensors[f"{key}.alpha"] = torch.tensor(float(len(layer.down)))
        if layer.dora_scale is not None:
            tensors[f"{key}.dora_scale"] = layer.dora_scale
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_tensors(temporary, tensors, _metadata(lora, config))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _joined(
    starts: Mapping[str, LayerStart], places: Mapping[str, OriginalPlace], base: TensorFiles
) -> dict[str, _JoinedLayer]:
    """The LoRA of each original layer that has a trained part."""
    names_of: dict[str, list[str]] = defaultdict(list)
    for name, place in places.items():
        names_of[place.layer].append(name)
    joined = {}
    for layer in dict.fromkeys(places[name].layer for name in starts):
        parts = sorted(names_of[layer], key=lambda name: places[name].part)
        trained = [starts[name] for name in parts if name in starts]
        down = torch.cat([start.down for start in trained])
        height = len(trained[0].up)
        up = torch.zeros(height * len(parts), len(down))
        column = 0
        for index, name in enumerate(parts):
            if name in starts:
                rank = len(starts[name].down)
                rows = up[index * height : (index + 1) * height]
                rows[:, column : column + rank] = places[name].reordered(starts[name].up)
                column += rank
        scales = None
        if any(start.magnitudes is not None for start in trained):
            scales = torch.cat([places[name].reordered(_dora_scale(name, starts.get(name), base)) for name in parts])
        joined[layer] = _JoinedLayer(down, up, scales)
    return joined


def _dora_scale(name: str, start: LayerStart | None, base: TensorFiles) -> torch.Tensor:
    """`(out, 1)`, such that ComfyUI and Forge draw the DoRA as it was trained.

    A DoRA is `m (W + B A) / |W + B A|`, by rows. These programs divide by `|W|` instead.
    """
    weight = base.tensor(f"{name}.weight").float()
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    if start is None or start.magnitudes is None:
        return norms
    return start.magnitudes[:, None] * norms / torch.linalg.vector_norm(weight + start.up @ start.down, dim=1)[:, None]


def _metadata(lora: LoraFile, config: Mapping[str, Any]) -> dict[str, str]:
    """What other programs show of a LoRA: modelspec's keys, and those of sd-scripts; and this project's record."""
    record = lora.record
    rank = str(Counter(layer.rank for layer in lora.layers.values()).most_common(1)[0][0])
    version = _model_version(config)
    written = datetime.fromtimestamp(lora.path.stat().st_mtime, UTC)
    resolution, trigger = record.get("resolution"), record.get("trigger")
    found = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-3{version and '-' + version}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": trigger or lora.path.stem,
        "modelspec.date": written.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": resolution and f"{resolution}x{resolution}",
        "modelspec.trigger_phrase": trigger,
        "ss_network_module": "networks.lora_sd3",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": f"sd3{version and '_' + version}",
        "ss_sd_model_name": record.get("base_model"),
        "ss_resolution": resolution and f"({resolution}, {resolution})",
        "ss_steps": record.get("steps"),
        "ss_seed": record.get("seed"),
        METADATA_KEY: json.dumps({**record, **({DORA_OF_BASE: True} if lora.is_dora else {})}, ensure_ascii=False),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _model_version(config: Mapping[str, Any]) -> str:
    """sd-scripts' name of the SD3 model of these sizes; empty for any other."""
    if config["num_layers"] == 38:
        return "5-large"
    if config["num_layers"] != 24:
        return ""
    return "5-medium" if config.get("dual_attention_layers") else "medium"
