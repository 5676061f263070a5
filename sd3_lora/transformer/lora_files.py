"""LoRA files of this and of other programs: found, read, checked, and attached to draw with.

Nothing is loaded in part. Every tensor of a file is applied, or the file is refused in one sentence that names its
format, before any model is loaded. docs/loras.md lists the formats.

Shapes: a layer of `in` to `out` features has `lora_A (rank, in)` and `lora_B (out, rank)`; it adds
`alpha / rank * B A x`. Those of a LoKr and a LoHa are in `lycoris.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, all_of
from sd3_lora.common.config import LoraType, ModelConfig
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.run_record import recorded_flags
from sd3_lora.transformer.lora import (
    LORA_FILE,
    LayerStart,
    LoraKind,
    peft_patterns,
    read_lora_record,
    scale_inputs,
)
from sd3_lora.transformer.lora_keys import (
    IN_COMFYUI,
    PEFT_PREFIX,
    PLAIN,
    TRANSFORMER,
    LayerKeys,
    keys_of_layers,
    keys_of_models,
    layer_widths,
)
from sd3_lora.transformer.lycoris import PARTS, ROW_PARTS, add_lycoris, lycoris_layers, misfit, parts_of, set_parts
from sd3_lora.transformer.original_layers import WHOLE, OriginalPlace

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.utils.other import get_pattern_key
from safetensors import safe_open

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TYPE_NAMES: Mapping[LoraType, str] = {"lora": "plain LoRA", "lokr": "LoKr", "loha": "LoHa"}
# Settings of PEFT that change nothing in a picture, or that the tensors themselves show.
_HARMLESS_SETTINGS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "fan_in_fan_out", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "peft_version", "runtime_config", "eva_config", "lora_bias", "ensure_weight_tying"),
}
# Starts that leave the base weights as they are. The others (PiSSA, OLoRA, LoftQ, …) fit a changed base.
_PLAIN_STARTS = {"none", "true", "false", "gaussian", "eva", "orthogonal"}


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA of one layer: the names of its tensors in the file, its strength `alpha / rank`, the layer's size.

    Attributes:
        keys: by part, as `LayerKeys` has them.
        rank: of it, when it is attached.
        alpha: of it, likewise.
        in_features: of the layer.
        out_features: of the layer.
        place: which rows of the tensors are the layer's.
        scales_inputs: whether a DoRA's magnitudes are of the inputs.
    """

    keys: Mapping[str, str]
    rank: int
    alpha: float
    in_features: int
    out_features: int
    place: OriginalPlace = WHOLE
    scales_inputs: bool = False

    @property
    def magnitude(self) -> str | None:
        """The name of a DoRA's magnitudes."""
        return self.keys.get("magnitude")

    @property
    def type(self) -> LoraType:
        """By its parts."""
        return next((type_ for type_, parts in PARTS.items() if {*parts} & self.keys.keys()), "lora")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file whose every tensor is known to fit a transformer, or one of the CLIPs beside it.

    Attributes:
        path: the safetensors file.
        layers: by the names of the transformer's modules; empty where it changes a CLIP alone.
        record: what this project's training noted; empty for another program's file.
        has_effect: whether any change of a weight is other than zero.
        clips: what the file has of CLIPs, by the names of `CLIPS`: each like a file of its own, whose layers have the
            names of that CLIP's modules.
    """

    path: Path
    layers: Mapping[str, LoraLayer]
    record: dict[str, Any]
    has_effect: bool
    clips: Mapping[str, LoraFile] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, LoraFile]:
        """By model, those that it changes; of the transformer this is itself."""
        return ({TRANSFORMER: self} if self.layers else {}) | dict(self.clips)

    @property
    def is_dora(self) -> bool:
        """Whether it has magnitudes (DoRA, arXiv 2402.09353)."""
        return any(layer.magnitude for layer in self.layers.values())

    @property
    def scales_inputs(self) -> bool:
        """Whether its magnitudes are of the layers' inputs."""
        return any(layer.scales_inputs for layer in self.layers.values())

    @property
    def has_biases(self) -> bool:
        """Whether it changes biases too."""
        return any("bias" in layer.keys for layer in self.layers.values())

    @property
    def type(self) -> LoraType:
        """That of its layers, which is one."""
        return next((layer.type for layer in self.layers.values()), "lora")

    @property
    def device_bytes(self) -> int:
        """The most that it takes on the device, in float32: its tensors, and what a layer works with.

        In a DoRA those are an identity `(in, in)`, and the weight, the difference and their sum, `(out, in)` each; in a
        LoKr and a LoHa less than three of the latter.
        """
        if not self.layers:
            return 0
        layers = self.layers.values() if self.is_dora or self.type != "lora" else ()
        identity = int(self.is_dora)
        working = [layer.in_features * (identity * layer.in_features + 3 * layer.out_features) for layer in layers]
        # The parts of a joined layer share tensors in the file, and not on the device.
        tensors = sum(4 * layer.rank * (layer.in_features + layer.out_features) for layer in self.layers.values())
        return max(self.path.stat().st_size, tensors) + 4 * max(working, default=0)

    def identity(self) -> str:
        """Of its bytes; and of how they are read, where that is not plainly with alpha = rank."""
        identity = hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]
        strengths = [
            [name if model == TRANSFORMER else f"{model}.{name}", layer.alpha / layer.rank, bool(layer.magnitude)]
            for model, part in self.parts.items()
            for name, layer in part.layers.items()
        ]
        if all(strength == 1 and not is_dora for _, strength, is_dora in strengths):
            return identity
        return f"{identity}/{hashlib.sha256(json.dumps(sorted(strengths)).encode()).hexdigest()[:8]}"

    def attach(self, transformer: SD3Transformer2DModel, name: str) -> None:
        """Adds the LoRA to a transformer as adapter `name`, in the base's dtype.

        Magnitudes stay in float32, and a LoKr and a LoHa, whose products are of small numbers. What it has of CLIPs is
        left to `ClipLoras`.
        """
        if not self.layers:
            return
        with warnings.catch_warnings():  # PEFT's, that a second adapter makes several
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            if self.type != "lora":
                self._attach_lycoris(transformer, name)
                return
            transformer.add_adapter(self._config(), adapter_name=name)
        tensors = self._tensors(self.layers)
        result = set_peft_model_state_dict(transformer, tensors, name)
        if result.unexpected_keys:
            raise RuntimeError(f"{self.path}: {result.unexpected_keys[0]} was not applied")
        for layer in self.layers if self.is_dora else ():
            module = transformer.get_submodule(layer)
            if self.scales_inputs:
                scale_inputs(module, name, self.start(layer))
                continue
            magnitude = module.lora_magnitude_vector[name].weight
            magnitude.data = tensors[f"{layer}.lora_magnitude_vector"].to(magnitude.device)

    def _attach_lycoris(self, transformer: SD3Transformer2DModel, name: str) -> None:
        settings = {"r": 1, "alpha": 1.0, "target_modules": list(self.layers)}
        add_lycoris(transformer, self.type, name, settings)
        for layer, own in self.layers.items():
            set_parts(transformer.get_submodule(layer), name, self._lycoris_tensors(layer), own.rank, own.alpha)

    def _lycoris_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A layer's by part, in the order of `PARTS`."""
        layer = self.layers[name]
        with safe_open(self.path, "pt") as handle:
            return {
                part: _rows(handle, layer.keys[part], layer.place if part in ROW_PARTS else WHOLE)
                for part in PARTS[layer.type]
                if part in layer.keys
            }

    def start(self, name: str) -> LayerStart:
        """The LoRA of one layer, with the strength folded in."""
        layer = self.layers[name]
        if layer.type != "lora":
            parts = self._lycoris_tensors(name)
            parts[list(parts)[-1]] *= layer.alpha / layer.rank
            return LayerStart(torch.empty(0), torch.empty(0), None, parts)
        strength = layer.alpha / layer.rank
        with safe_open(self.path, "pt") as handle:
            down, up = _matrices(handle, layer.keys, layer.place)
            bias = _rows(handle, layer.keys["bias"], layer.place) * strength if "bias" in layer.keys else None
            of_inputs = layer.place if not layer.scales_inputs else WHOLE
            magnitudes = _rows(handle, layer.magnitude, of_inputs).flatten() if layer.magnitude else None
        return LayerStart(down, up * strength, magnitudes, bias=bias, scales_inputs=layer.scales_inputs)

    @torch.no_grad()
    def merge_into(self, model: torch.nn.Module, scale: float) -> None:
        """Adds it to a model's weights and biases, in float32, each rounded once to the dtype that it has."""
        for name in self.layers:
            layer: Any = model.get_submodule(name)
            start = self.start(name)
            layer.weight.copy_(start.added_to(layer.weight, scale))
            if start.bias is not None:
                layer.bias.copy_(layer.bias.float() + scale * start.bias)

    def starts(self) -> dict[str, LayerStart]:
        """What training begins with, `start_from`, by the names of the transformer's modules."""
        return {name: self.start(name) for name in self.layers}

    def _config(self) -> LoraConfig:
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        alphas = {name: layer.alpha for name, layer in self.layers.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config = LoraConfig(
            r=int(rank),
            lora_alpha=alpha,
            rank_pattern=peft_patterns(ranks, rank),
            alpha_pattern=peft_patterns(alphas, alpha),
            use_dora=self.is_dora and not self.scales_inputs,
            lora_bias=self.has_biases,
            target_modules=list(self.layers),
        )
        # PEFT asks after quantized layers of other libraries first, and raises where an old torchao is installed.
        config._register_custom_module({torch.nn.Linear: Linear})
        return config

    def _tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(self.path, "pt") as handle:
            for name in names:
                layer = self.layers[name]
                down, up = _matrices(handle, layer.keys, layer.place)
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
                if layer.magnitude and not layer.scales_inputs:
                    tensors[f"{name}.lora_magnitude_vector"] = _rows(handle, layer.magnitude, layer.place).flatten()
                if self.has_biases:
                    has_bias = "bias" in layer.keys
                    bias = _rows(handle, layer.keys["bias"], layer.place) if has_bias else torch.zeros(len(up))
                    tensors[f"{name}.lora_B.bias"] = bias
        return tensors


def _rows(handle: Any, key: str, place: OriginalPlace) -> torch.Tensor:
    return place.rows(handle.get_tensor(key).float())


def _matrices(handle: Any, keys: Mapping[str, str], place: OriginalPlace) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's `lora_A (rank, in)` and `lora_B (out, rank)`, float32; without what `lora_B` makes nothing of.

    Of a joined layer, whose `lora_up` is zero where it concerns the other parts, this leaves the layer's own rank. A
    whole difference is its own product with an identity.
    """
    if "diff" in keys:
        difference = _rows(handle, keys["diff"], place)
        identity = torch.eye(min(difference.shape))
        return (identity, difference) if len(difference) >= difference.shape[1] else (difference, identity)
    down, up = handle.get_tensor(keys["down"]).float(), _rows(handle, keys["up"], place)
    used = up.any(dim=0)
    if place.parts == 1 or used.all() or not used.any():
        return down, up
    return down[used], up[:, used]


def require_drawable(loras: Sequence[LoraFile], scales: Sequence[float], is_streamed: bool) -> None:
    """Checks what is asked of a DoRA, whose magnitudes belong to the whole weight and not to what is added.

    A CLIP's are merged before it computes, so its weights may be streamed.

    Raises:
        UserError: it is scaled, or beside another LoRA, or its weights are streamed.
    """
    for lora, scale in zip(loras, scales, strict=True):
        if not any(part.is_dora for part in lora.parts.values()):
            continue
        if scale != 1:
            raise UserError(f"{lora.path} is a DoRA, which has one strength: leave out --lora_scale {scale:g}")
        if len(loras) > 1:
            raise UserError(f"{lora.path} is a DoRA, which does not add up with other LoRAs: give one --lora alone")
        if is_streamed and lora.is_dora:
            raise UserError(
                f"{lora.path} is a DoRA, whose layers cannot be streamed to the device: type --stream_blocks 0, or "
                "--stream_blocks 0 --base_precision nf4 where that does not fit"
            )


def require_start(lora: LoraFile, ranks: Mapping[str, int], kind: LoraKind) -> None:
    """Checks that training can begin with a LoRA.

    Args:
        lora: to begin with.
        ranks: of the layers that are trained, by the names of the transformer's modules.
        kind: that is trained.

    Raises:
        UserError: it is of another kind; a layer of it is not trained, or has a larger rank.
    """
    flag = f"--init_lora {lora.path}"
    if lora.scales_inputs or lora.has_biases:
        of = "magnitudes of the layers' inputs" if lora.scales_inputs else "biases"
        raise UserError(f"{flag} has {of}, which are not trained here: begin with another")
    for name in lora.layers:
        if name not in ranks and not name.startswith("transformer_blocks."):
            raise UserError(f"{flag} has a LoRA on {name}, which is not trained here: begin with another")
    faults = [f"{flag} {fault}" for fault in _start_faults(lora, ranks, kind)]
    if faults:
        raise UserError(all_of(faults, "--init_lora"))


def _start_faults(lora: LoraFile, ranks: Mapping[str, int], kind: LoraKind) -> Iterator[str]:
    """What flags can mend, all of it, so that one round of typing does."""
    if lora.type != kind.type:
        remedy = f"leave out --lora_type {kind.type}" if lora.type == "lora" else f"type --lora_type {lora.type}"
        yield f"is a {TYPE_NAMES[lora.type]}, and this command trains another kind: {remedy}"
    more = [name for name in lora.layers if name not in ranks]
    if more:
        wanted = sorted({each.split(".", 2)[2] for each in (*lora.layers, *ranks) if each.startswith("transformer_b")})
        yield (
            f"has a LoRA on {more[0]}, which this command does not train: type --lora_layers {','.join(wanted)} "
            "and leave out --lora_blocks"
        )
    if lora.type == "lora":  # `require_lycoris_start` compares the shapes of others
        least = min(ranks.values(), default=0)  # what a layer will have that is not trained yet
        larger = {name: layer.rank for name, layer in lora.layers.items() if layer.rank > ranks.get(name, least)}
        for name, rank in list(larger.items())[:1]:
            yield (
                f"has a rank of {rank} on {name}, and this command {ranks.get(name, least)}: type --rank "
                f"{max(larger.values())} and leave out --rank_pattern"
            )
    if lora.is_dora and not kind.use_dora:
        yield "is a DoRA: add --use_dora"


def require_lycoris_start(lora: LoraFile, transformer: SD3Transformer2DModel) -> None:
    """Checks that training can begin with a LoKr or a LoHa.

    Args:
        lora: to begin with, which `require_start` has seen.
        transformer: with what is to be trained, without weights.

    Raises:
        UserError: its parts have other shapes.
    """
    layers = lycoris_layers(transformer)
    for name in lora.layers:
        (trained,) = layers[name].active_adapters
        wanted = {part: list(tensor.shape) for part, tensor in parts_of(layers[name], trained).items()}
        found = {part: list(tensor.shape) for part, tensor in lora.start(name).lycoris.items()}
        if wanted != found:
            raise UserError(
                f"--init_lora {lora.path} has {_shapes_in_words(found)} on {name}, and this command "
                f"{_shapes_in_words(wanted)}: type the --rank"
                + (" and --lokr_factor" if lora.type == "lokr" else "")
                + " that it was trained with"
            )


def _shapes_in_words(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{part} {'×'.join(map(str, shapes[part]))}" for part in sorted(shapes))


# Finding


def find_lora(name: str, flag: str = "--lora") -> Path:
    """The LoRA file behind a folder, a file or a hub id.

    Args:
        name: of it.
        flag: that names it, for messages.

    Raises:
        UserError: there is none, or several.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path / _the_lora_of(name, sorted(file.name for file in path.iterdir() if file.is_file()), flag)
    if path.is_file():
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            raise UserError(f"{flag} {name} is a pickle, which can run code when it is read: give a .safetensors file")
        return path
    if path.suffix == ".safetensors":
        raise UserError(f"{flag} {name}: there is no such file: check the path")
    try:
        return _download_lora(name, flag)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{flag} {name} is neither a file or folder here nor a LoRA on the hub: check the path"
        ) from error


def _download_lora(name: str, flag: str) -> Path:
    try:
        return Path(hf_hub_download(name, LORA_FILE))
    except LocalEntryNotFoundError:  # also an EntryNotFoundError
        raise
    except EntryNotFoundError:
        files = HfApi().list_repo_files(name)
        file = _the_lora_of(name, [file for file in files if "/" not in file], flag)
        if file == _PEFT_FILE and _PEFT_CONFIG in files:
            hf_hub_download(name, _PEFT_CONFIG)  # lands in the same folder
        return Path(hf_hub_download(name, file))


def _the_lora_of(name: str, files: Sequence[str], flag: str) -> str:
    candidates = [file for file in files if file.endswith(".safetensors") and not file.startswith(".")]
    for usual in (LORA_FILE, _PEFT_FILE):
        if usual in candidates:
            return usual
    if len(candidates) > 1:
        raise UserError(
            f"{name} holds {len(candidates)} safetensors files and none is {LORA_FILE}: give one of them as {flag}, "
            f"such as {Path(name) / candidates[0]}"
        )
    if not candidates:
        raise UserError(f"{name} holds no {LORA_FILE}: give the training's --output_dir")
    return candidates[0]


# Reading


def base_of(path: Path, model: ModelConfig) -> ModelFiles:
    """The base model of a LoRA: the one that the flags name, else the one that its training noted.

    Of a folder the LoRA holds the name alone, since it is meant for strangers; `run.json` beside it has the path.

    Raises:
        UserError: neither says it, or the model is not there.
    """
    if not model.is_miniature:
        return ModelFiles(model)
    base = recorded_flags(path.parent / "run.json", ModelConfig).get("pretrained_model_name_or_path")
    base = base or read_lora_record(path).get("base_model")
    if base is None:
        raise UserError(f"{path} does not say its base model: add --pretrained_model_name_or_path")
    return ModelFiles(replace(model, pretrained_model_name_or_path=None if base == "miniature" else base))


def read_lora_file(
    path: Path,
    transformer_config: Mapping[str, Any],
    read_config: Callable[[str], Mapping[str, Any]] | None = None,
) -> LoraFile:
    """Reads a LoRA's names, shapes and settings, and checks that each tensor fits its model and is finite.

    Args:
        path: the safetensors file. A PEFT adapter has its adapter_config.json beside it.
        transformer_config: of the model to draw with; nothing of the model is loaded.
        read_config: gives the configuration of a CLIP by its name, where the caller applies what the file has of it.

    Raises:
        UserError: the file is not whole, of another model, or of a format that is not drawn; or it has layers of text
            encoders, and the caller does not apply them.
    """
    record = read_lora_record(path)
    with safe_open(path, "pt") as handle:
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        parts = {}
        for model, keys in (keys_of_models(shapes) or {TRANSFORMER: []}).items():
            if model == TRANSFORMER:
                config = transformer_config
            elif read_config is not None:
                config = read_config(model)
            else:
                raise UserError(
                    f"{path} has LoRA layers of text encoders (its tensor {keys[0]}), which this command does not "
                    "apply: give a LoRA of the transformer alone; only drawing, export and merge take the whole"
                )
            layers = _read_layers(path, handle, model, {key: shapes[key] for key in keys}, layer_widths(config, model))
            parts[model] = LoraFile(path, layers, record, _has_effect(handle, layers))
        _require_finite(path, handle, shapes)
    transformer = parts.pop(TRANSFORMER, LoraFile(path, {}, record, False))
    has_effect = transformer.has_effect or any(part.has_effect for part in parts.values())
    return replace(transformer, has_effect=has_effect, clips=parts)


def _read_layers(
    path: Path,
    handle: Any,
    model: str,
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, tuple[int, int] | None],
) -> dict[str, LoraLayer]:
    """What the file has of one model, by the names of its modules."""
    keyed = keys_of_layers(path, shapes, widths, model)
    settings = _read_settings(path, handle.metadata() or {}, shapes, model)
    layers: dict[str, LoraLayer] = {}
    for name, layer in keyed.items():
        layers |= _read_layer(path, handle, name, layer, shapes, widths[name], settings)
    if len({layer.type for layer in layers.values()}) > 1:
        raise UserError(f"{path} has layers of several kinds, which are {IN_COMFYUI}")
    magnitudes = [layer.magnitude for layer in layers.values()]
    if not all(magnitudes) and (any(magnitudes) or settings.use_dora):
        raise UserError(f"{path} is a DoRA that lacks magnitudes of some layers: save or download it again")
    return layers


def _read_layer(
    path: Path,
    handle: Any,
    name: str,
    layer: LayerKeys,
    shapes: Mapping[str, tuple[int, ...]],
    widths: tuple[int, int] | None,
    settings: _Settings,
) -> dict[str, LoraLayer]:
    """The layer by its name; nothing where it is a part of a joined layer that the file leaves as it is."""
    in_features, out_features = _require_linear(path, name, widths)
    keys, place = layer.keys, layer.place or WHOLE
    _require_shapes(path, name, keys, shapes, (in_features, place.parts * out_features))
    rank = _rank_of(keys, shapes)
    written = float(handle.get_tensor(keys["alpha"])) if "alpha" in keys and rank else None
    rank = rank or 1
    strength = settings.alpha(path, name, rank, written) / rank
    scales_inputs = "magnitude" in keys and shapes[keys["magnitude"]] == (1, in_features) and in_features > 1
    if scales_inputs and place.parts > 1:
        raise UserError(
            f"{path} is a DoRA with magnitudes of the inputs of q, k and v as one layer ({keys['magnitude']}), which "
            f"is {IN_COMFYUI}"
        )
    if any(part in keys for part in ROW_PARTS):
        _require_parts_of_rows(path, keys, shapes, place)
    elif "diff" in keys or place.parts > 1:
        changed = handle.get_tensor(keys.get("diff") or keys["up"])
        if not {"magnitude", "bias"} & keys.keys() and changed.any() and not place.rows(changed).any():
            return {}
        rank = len(_matrices(handle, keys, place)[0])
    return {name: LoraLayer(keys, rank, strength * rank, in_features, out_features, place, scales_inputs)}


def _require_parts_of_rows(
    path: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], place: OriginalPlace
) -> None:
    """Checks that a LoKr or a LoHa of a joined layer is one of each of its parts."""
    pieces = place.parts * (2 if place.is_swapped else 1)
    for key in (keys[part] for part in ROW_PARTS if part in keys):
        if shapes[key][0] % pieces:
            raise UserError(
                f"{path} is a LoKr of q, k and v as one layer, and {key} is not made of {pieces} like parts, which is "
                f"{IN_COMFYUI}"
            )


def _require_linear(path: Path, name: str, widths: tuple[int, int] | None) -> tuple[int, int]:
    if widths is None:
        raise UserError(
            f"{path} has a LoRA on {name}, which is no linear layer, and is not drawn here: draw with it in ComfyUI, "
            "or train it again on linear layers alone"
        )
    return widths


def _rank_of(keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """A layer's rank; None of a LoKr whose matrices are both whole, which has a strength of 1 whatever its alpha."""
    inner = next((keys[part] for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if part in keys), None)
    return None if inner is None else shapes[inner][0]


def _require_lycoris_shapes(
    path: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], widths: tuple[int, int]
) -> None:
    for part in ("magnitude", "down", "up"):
        if part in keys:
            of = "magnitudes (DoRA)" if part == "magnitude" else "a plain LoRA"
            key = next(keys[part] for parts in PARTS.values() for part in parts if part in keys)
            raise UserError(f"{path} has a LyCORIS LoKr or LoHa with {of} ({key}), which is {IN_COMFYUI}")
    parts = {part: shapes[key] for part, key in keys.items() if part != "alpha"}
    wrong = misfit(parts, *widths)
    if wrong:
        key = next((keys[part] for part in keys if part.startswith(wrong)), next(iter(keys.values())))
        raise UserError(
            f"{path} lacks a part of this layer, or was trained on another model ({key} does not fit): download it "
            "again, or give its own base model"
        )


def _require_shapes(
    path: Path,
    name: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    widths: tuple[int, int],
) -> None:
    if "alpha" in keys and math.prod(shapes[keys["alpha"]]) != 1:
        raise UserError(f"{path}: {keys['alpha']} is not one number: save or download it again")
    if any(part in keys for parts in PARTS.values() for part in parts):
        _require_lycoris_shapes(path, keys, shapes, widths)
        return
    if "diff" in keys:
        _require_difference(path, keys, shapes, widths)
        return
    if "down" not in keys or "up" not in keys:
        present = next(iter(keys.values()))
        raise UserError(f"{path} lacks a part of the LoRA of {name} (it has {present}): save or download it again")
    down, up = shapes[keys["down"]], shapes[keys["up"]]
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise UserError(f"{path}: {keys['down']} and {keys['up']} do not fit together: save or download it again")
    if (down[1], up[0]) != widths:
        key = keys["down"] if down[1] != widths[0] else keys["up"]
        raise UserError(f"{path} was trained on another model ({key} does not fit): give its own base model")
    magnitude, bias = keys.get("magnitude"), keys.get("bias")
    if magnitude and shapes[magnitude] not in ((widths[1],), (widths[1], 1), (1, widths[0])):
        raise UserError(f"{path} was trained on another model ({magnitude} does not fit): give its own base model")
    if bias and (shapes[bias] != widths[1:] or magnitude or not bias.endswith("bias")):
        raise UserError(f"{path} has {bias} beside its LoRA, which is {IN_COMFYUI}")


def _require_difference(
    path: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], widths: tuple[int, int]
) -> None:
    """Checks a layer's whole difference, and its bias's."""
    other = next((key for part, key in keys.items() if part not in ("diff", "bias", "alpha")), None)
    if other:
        raise UserError(f"{path} has {other} beside {keys['diff']}, which is {IN_COMFYUI}")
    wanted = {"diff": widths[::-1], "bias": widths[1:]}
    for part, shape in wanted.items():
        if part in keys and shapes[keys[part]] != shape:
            raise UserError(f"{path} was trained on another model ({keys[part]} does not fit): give its own base model")


def _require_finite(path: Path, handle: Any, keys: Iterable[str]) -> None:
    """Checks every tensor.

    Raises:
        UserError: a NaN or an infinity, or a tensor of whole numbers.
    """
    for key in keys:
        tensor = handle.get_tensor(key)
        if not tensor.is_floating_point() and not key.endswith("alpha"):
            raise UserError(f"{path}: {key} is quantized ({tensor.dtype}), which is not read: give the LoRA in 16 bits")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{path} has NaN or infinity in {key}: use an earlier checkpoint of its training, or train again at a "
                "lower --learning_rate"
            )


def _has_effect(handle: Any, layers: Mapping[str, LoraLayer]) -> bool:
    """Whether any of the layers changes a picture."""
    return any(
        bool(layer.magnitude)
        or (layer.alpha != 0 and all(handle.get_tensor(key).float().any() for key in layer.keys.values()))
        for layer in layers.values()
    )


# Settings


@dataclass(frozen=True)
class _Settings:
    """What PEFT's configuration says of the strength; None or empty for a file without one."""

    lora_alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def alpha(self, path: Path, name: str, rank: int, written: float | None) -> float:
        """The alpha of a layer, for a strength of alpha / rank.

        A scalar beside the tensors is its alpha, else the configuration's, else the rank (strength 1).
        """
        configured = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)
        if written is not None and configured is not None and not math.isclose(written, configured, rel_tol=1e-3):
            raise UserError(
                f"{path} says alpha {written:g} beside the tensors of {name} and {configured:g} in its metadata: save "
                "it again with one of them"
            )
        alpha = configured if configured is not None else written
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.use_rslora else float(alpha)


def _read_settings(path: Path, metadata: Mapping[str, str], keys: Iterable[str], model: str) -> _Settings:
    """PEFT's configuration for one model: of an adapter folder, or in the metadata as diffusers writes it.

    Raises:
        UserError: it cannot be read, or asks for what is not drawn.
    """
    is_adapter = any(key.startswith(PEFT_PREFIX) for key in keys)
    beside = path.with_name(_PEFT_CONFIG)
    try:
        if (is_adapter or path.name == _PEFT_FILE) and beside.is_file():
            source, text = str(beside), beside.read_text(encoding="utf-8")
        else:
            source, text = f"{path}'s metadata", metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except (ValueError, OSError) as error:
        raise UserError(f"the adapter's settings beside {path} cannot be read ({error}): download it again") from error
    prefix = f"{model}."
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    is_of_all = model == TRANSFORMER  # settings without a model's name
    settings = own or {key: value for key, value in settings.items() if is_of_all and not key.startswith("text_enc")}
    if not settings:
        if is_adapter:
            raise UserError(
                f"{path} is a PEFT adapter without its {_PEFT_CONFIG}, which has its strength: put that beside it"
            )
        return _Settings()
    _require_plain(source, settings)
    try:
        patterns = {
            re.compile(name).pattern: float(alpha) for name, alpha in (settings.get("alpha_pattern") or {}).items()
        }
        alpha = float(settings.get("lora_alpha", LoraConfig().lora_alpha))
        if not all(map(math.isfinite, [alpha, *patterns.values()])):
            raise ValueError("an alpha is not finite")
    except (re.error, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} cannot be read ({error}): download it again") from error
    return _Settings(alpha, patterns, bool(settings.get("use_rslora")), bool(settings.get("use_dora")))


def _require_plain(source: str, settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("peft_type") or "LORA").rsplit(".", 1)[-1]
    if kind != "LORA":
        raise UserError(f"{source} is of PEFT's {kind}, which is {PLAIN}")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{source} says init_lora_weights {start}, which fits a base that it changed: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    usual = LoraConfig().to_dict()
    for name, value in settings.items():
        if value and value != usual.get(name) and name not in _HARMLESS_SETTINGS:
            raise UserError(f"{source} says {name} {value}, which is {PLAIN}")
