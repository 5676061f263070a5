"""LoRA files of this and of other programs: found, read, checked, and attached to draw with.

Nothing is loaded in part. Every tensor of a file is applied, or the file is refused in one sentence that names its
format, before any model is loaded. docs/loras.md lists the formats.

Shapes: a layer of `in` to `out` features has `lora_A (rank, in)` and `lora_B (out, rank)`; it adds
`alpha / rank * B A x`. Those of a LoKr and a LoHa are in `lycoris.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import LoraType, ModelConfig
from sd3_lora.common.identifier_embedding import (
    IdentifierEmbedding,
    embedding_path,
    is_embedding,
    read_identifier_embedding,
)
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.run_record import recorded_flags
from sd3_lora.transformer.lora import (
    LORA_FILE,
    LayerStart,
    peft_patterns,
    read_lora_record,
)
from sd3_lora.transformer.lora_keys import (
    IN_COMFYUI,
    TRANSFORMER,
    LayerKeys,
    keys_of_layers,
    keys_of_models,
    layer_widths,
)
from sd3_lora.transformer.lora_shapes import (
    rank_of,
    require_finite,
    require_linear,
    require_parts_of_rows,
    require_shapes,
)
from sd3_lora.transformer.lycoris import PARTS, ROW_PARTS, add_lycoris, set_parts
from sd3_lora.transformer.original_layers import WHOLE, OriginalPlace
from sd3_lora.transformer.peft_settings import PEFT_CONFIG, PEFT_FILE, PeftSettings, read_peft_settings

import torch
from diffusers import SD3Transformer2DModel
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import safe_open

if TYPE_CHECKING:
    from peft import LoraConfig

_MOST_DIMENSIONS = 4  # a convolution's


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
    def identifier(self) -> str | None:
        """The word with whose embedding it was trained, if any; the embedding is a file of its own."""
        word: str | None = self.record.get("identifier_embedding", {}).get("word")
        return word

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

    @property
    def merging_bytes(self) -> int:
        """The most that merging one layer takes on the device: five of its weight in float32, and its tensors."""
        layers = self.layers.values()
        sizes = (
            5 * layer.in_features * layer.out_features + layer.rank * (layer.in_features + layer.out_features)
            for layer in layers
        )
        return 4 * max(sizes, default=0)

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
        from sd3_lora.transformer.added_layers import add_adapter, scale_inputs  # imports PEFT

        from peft import set_peft_model_state_dict

        with warnings.catch_warnings():  # PEFT's, that a second adapter makes several
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            if self.type != "lora":
                self._attach_lycoris(transformer, name)
                return
            add_adapter(transformer, self._config(), name)
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
        """Adds it to a model's weights and biases, in float32, each rounded once to the dtype that it has.

        That is computed on the host, wherever the model is: the file's tensors are there.
        """
        for name in self.layers:
            layer: Any = model.get_submodule(name)
            start = self.start(name)
            layer.weight.copy_(start.added_to(layer.weight.cpu(), scale))
            if start.bias is not None:
                layer.bias.copy_(layer.bias.cpu().float() + scale * start.bias)

    def starts(self) -> dict[str, LayerStart]:
        """What training begins with, `start_from`, by the names of the transformer's modules."""
        return {name: self.start(name) for name in self.layers}

    def _config(self) -> LoraConfig:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

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


def identifier_beside(lora: LoraFile, widths: Mapping[str, int], or_else: str = "") -> IdentifierEmbedding:
    """The identifier's embedding that a LoRA was trained with, which its metadata name.

    Args:
        lora: so trained. Its file may be an export, beside the LoRA's own.
        widths: of the CLIPs, by their names.
        or_else: what else can be done where it is missing.

    Raises:
        UserError: it is not beside the LoRA.
    """
    note, usual = lora.record["identifier_embedding"], embedding_path(lora.path)
    if not usual.is_file():
        _fetch_beside(lora.path, usual.name)
    beside = [path for path in sorted(lora.path.parent.glob("*.safetensors")) if is_embedding(path)]
    for path in sorted(beside, key=lambda path: path != usual):
        identifier = read_identifier_embedding(path, widths)
        if identifier.note == note:
            return identifier
    found = ", ".join(path.name for path in beside)
    raise UserError(
        f"{lora.path} was trained with an embedding of {note['word']!r}, which is not beside it as {usual.name}"
        f"{f' ({found} is of another training)' if found else ''}: put it there{or_else}"
    )


def _fetch_beside(path: Path, name: str) -> None:
    """Downloads a file that belongs to a LoRA of the hub into its folder, where the LoRA came from there."""
    parts = path.parts  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT/FILE
    if len(parts) < 4 or parts[-3] != "snapshots" or not parts[-4].startswith("models--"):
        return
    with contextlib.suppress(EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled):
        repo = parts[-4].removeprefix("models--").replace("--", "/")
        hf_hub_download(repo, name, revision=parts[-2], cache_dir=Path(*parts[:-4]))


def _download_lora(name: str, flag: str) -> Path:
    try:
        return Path(hf_hub_download(name, LORA_FILE))
    except LocalEntryNotFoundError:  # also an EntryNotFoundError
        raise
    except EntryNotFoundError:
        files = HfApi().list_repo_files(name)
        file = _the_lora_of(name, [file for file in files if "/" not in file], flag)
        if file == PEFT_FILE and PEFT_CONFIG in files:
            hf_hub_download(name, PEFT_CONFIG)  # lands in the same folder
        return Path(hf_hub_download(name, file))


def _the_lora_of(name: str, files: Sequence[str], flag: str) -> str:
    candidates = [file for file in files if file.endswith(".safetensors") and not file.startswith(".")]
    for usual in (LORA_FILE, PEFT_FILE):
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
        for key, shape in shapes.items():
            if len(shape) > _MOST_DIMENSIONS:
                raise UserError(f"{path}: {key} has {len(shape)} dimensions, as no LoRA has: save or download it again")
        parts = {}
        for model, keys in (keys_of_models(shapes) or {TRANSFORMER: []}).items():
            if model == TRANSFORMER:
                config = transformer_config
            elif read_config is not None:
                config = read_config(model)
            else:
                raise UserError(
                    f"{path} has LoRA layers of text encoders (its tensor {keys[0]}), which this command does not "
                    "apply: give a LoRA of the transformer alone; drawing, export, merge and training with "
                    "--train_text_encoder take the whole"
                )
            layers = _read_layers(path, handle, model, {key: shapes[key] for key in keys}, layer_widths(config, model))
            parts[model] = LoraFile(path, layers, record, _has_effect(handle, layers))
        require_finite(path, handle, shapes)
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
    settings = read_peft_settings(path, handle.metadata() or {}, shapes, model)
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
    settings: PeftSettings,
) -> dict[str, LoraLayer]:
    """The layer by its name; nothing where it is a part of a joined layer that the file leaves as it is."""
    in_features, out_features = require_linear(path, name, widths)
    keys, place = layer.keys, layer.place or WHOLE
    require_shapes(path, name, keys, shapes, (in_features, place.parts * out_features))
    rank = rank_of(keys, shapes)
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
        require_parts_of_rows(path, keys, shapes, place)
    elif "diff" in keys or place.parts > 1:
        changed = handle.get_tensor(keys.get("diff") or keys["up"])
        if not {"magnitude", "bias"} & keys.keys() and changed.any() and not place.rows(changed).any():
            return {}
        rank = len(_matrices(handle, keys, place)[0])
    return {name: LoraLayer(keys, rank, strength * rank, in_features, out_features, place, scales_inputs)}


def _has_effect(handle: Any, layers: Mapping[str, LoraLayer]) -> bool:
    """Whether any of the layers changes a picture."""
    return any(
        bool(layer.magnitude)
        or (layer.alpha != 0 and all(handle.get_tensor(key).float().any() for key in layer.keys.values()))
        for layer in layers.values()
    )
