"""A LoRA in kohya's names, for programs that know the original SD3: sd-scripts, ComfyUI, Forge, A1111.

Layers that are joined there (q, k, v) have one LoRA, whose `lora_up` is block-diagonal: with ranks r of the parts,
`lora_down (sum of r, in)` and `lora_up (3 * out, sum of r)`. Parts that are not trained are zero.

The CLIPs' layers are named `lora_te1_…` and `lora_te2_…`; for A1111, which knows its own modules' names alone,
`clip_l_transformer_…` and `clip_g_transformer_…`.

The strength is folded into `lora_up`, so `.alpha` is the number of `lora_down`'s rows. sd-scripts fails without one;
A1111 cuts a key at its last two dots and fails at `name.alpha`, so its format has none, and is read at strength 1.

What is no plain LoRA (a DoRA, a LoKr, a LoHa, one with biases) becomes `.diff`, the differences of whole weights, and
`.diff_b`: ComfyUI and Forge add them as they are. Of a DoRA's `dora_scale` they make something else: they divide by the
norms of the base's rows (a change of that is proposed there).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.command_line import UserError, quoted
from sd3_lora.common.config import LoraType
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.tensor_files import TensorFiles, write_tensors
from sd3_lora.transformer.lora import METADATA_KEY, LayerStart
from sd3_lora.transformer.lora_files import LoraFile
from sd3_lora.transformer.lora_keys import FLAT_CLIP_PREFIXES, TRANSFORMER, layer_widths
from sd3_lora.transformer.original_layers import OriginalPlace, original_places

import torch

_PREFIX = "lora_unet_"
_CLIP_FORMS = ("kohya", "a1111")  # in the order of `FLAT_CLIP_PREFIXES`


def export_path(path: Path, form: str) -> Path:
    """Where a LoRA's export goes unless another place is named: beside it."""
    return path.with_name(f"{path.stem}_{form}.safetensors")


def is_plain(type_: LoraType, is_dora: bool) -> bool:
    """Whether a LoRA is two matrices a layer, as every program reads them."""
    return type_ == "lora" and not is_dora


def require_exportable(path: Path, is_plain: bool, form: str) -> None:
    """Checks that a format can hold a LoRA.

    Args:
        path: of the LoRA, or where it will be.
        is_plain: whether it is a plain one.
        form: the format.

    Raises:
        UserError: it cannot.
    """
    if form == "a1111" and not is_plain:
        command = quoted(["python", "-m", "sd3_lora.merge", str(path), "--output_dir", "merged"])
        raise UserError(
            f"A1111 reads plain LoRAs alone, and {path} is another kind: leave out a1111; `{command}` makes a whole "
            "model of it and its base"
        )


def export_lora(lora: LoraFile, form: str, path: Path, files: ModelFiles) -> None:
    """Writes a LoRA in kohya's names, atomically; matrices in float32, whole differences in float16.

    Args:
        lora: of any format that is read here.
        form: kohya or a1111.
        path: to write.
        files: of its base, whose weights are read for what is no plain LoRA.

    Raises:
        UserError: the format cannot hold it.
    """
    is_plain_part = {
        model: is_plain(part.type, part.is_dora) and not part.has_biases for model, part in lora.parts.items()
    }
    require_exportable(lora.path, all(is_plain_part.values()), form)
    tensors: dict[str, torch.Tensor] = {}
    for model, part in lora.parts.items():
        tensors |= _tensors(part, model, form, is_plain_part[model], files)
    with replacing(path) as unfinished:
        write_tensors(unfinished, tensors, _metadata(lora, files.read_config(TRANSFORMER)))


def _tensors(lora: LoraFile, model: str, form: str, plain: bool, files: ModelFiles) -> dict[str, torch.Tensor]:
    """What a LoRA has of one model, in the format's names."""
    if model == TRANSFORMER:
        places, prefix = original_places(layer_widths(files.read_config(model))), _PREFIX
    else:
        places = {name: OriginalPlace(name) for name in lora.layers}
        prefix = FLAT_CLIP_PREFIXES[model][_CLIP_FORMS.index(form)]
    names_of: dict[str, list[str]] = defaultdict(list)
    for name in sorted(places, key=lambda name: places[name].part):
        names_of[places[name].layer].append(name)
    tensors: dict[str, torch.Tensor] = {}
    if not plain:
        files.component(model)
    with TensorFiles([] if plain else files.weight_files(model)) as base:
        for layer in dict.fromkeys(places[name].layer for name in lora.layers):
            parts = {name: lora.start(name) if name in lora.layers else None for name in names_of[layer]}
            found = _matrices(parts, places, form == "kohya") if plain else _differences(parts, places, base)
            key = prefix + layer.replace(".", "_")
            tensors |= {f"{key}.{part}": tensor for part, tensor in found.items()}
    return tensors


def _matrices(
    parts: Mapping[str, LayerStart | None], places: Mapping[str, OriginalPlace], with_alpha: bool
) -> dict[str, torch.Tensor]:
    """The plain LoRA of an original layer, whose parts are diffusers' layers; None of one that is not trained."""
    trained = [start for start in parts.values() if start]
    down = torch.cat([start.down for start in trained])
    height, column = len(trained[0].up), 0
    up = torch.zeros(height * len(parts), len(down))
    for index, (name, start) in enumerate(parts.items()):
        if start:
            rank = len(start.down)
            rows = slice(index * height, (index + 1) * height)
            up[rows, column : column + rank] = places[name].reordered(start.up)
            column += rank
    alpha = {"alpha": torch.tensor(float(len(down)))} if with_alpha else {}
    return {"lora_down.weight": down, "lora_up.weight": up, **alpha}


def _differences(
    parts: Mapping[str, LayerStart | None], places: Mapping[str, OriginalPlace], base: TensorFiles
) -> dict[str, torch.Tensor]:
    """What is added to an original layer's weight, `(out, in)`, and maybe to its bias, `(out,)`; float16."""
    weights, biases = [], []
    for name, start in parts.items():
        weight = base.tensor(f"{name}.weight").float()
        change = start.added_to(weight) - weight if start else torch.zeros_like(weight)
        bias = start.bias if start and start.bias is not None else torch.zeros(len(weight))
        weights.append(places[name].reordered(change))
        biases.append(places[name].reordered(bias))
    found = {"diff": torch.cat(weights).half(), "diff_b": torch.cat(biases).half()}
    return {part: tensor for part, tensor in found.items() if part == "diff" or tensor.any()}


def _metadata(lora: LoraFile, config: Mapping[str, Any]) -> dict[str, str]:
    """What other programs show of a LoRA: modelspec's keys, and those of sd-scripts; and this project's record."""
    record = lora.record
    ranks = [layer.rank for part in lora.parts.values() for layer in part.layers.values()]
    rank = str(Counter(ranks).most_common(1)[0][0])
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
        METADATA_KEY: json.dumps(record, ensure_ascii=False),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _model_version(config: Mapping[str, Any]) -> str:
    """sd-scripts' name of the SD3 model of these sizes; empty for any other."""
    if config["num_layers"] == 38:
        return "5-large"
    if config["num_layers"] != 24:
        return ""
    return "5-medium" if config.get("dual_attention_layers") else "medium"
