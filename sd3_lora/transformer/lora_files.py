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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import LoraType
from sd3_lora.transformer.lora import LORA_FILE, LayerStart, LoraKind, peft_patterns, read_lora_record
from sd3_lora.transformer.lycoris import PARTS, add_lycoris, lycoris_layers, misfit, parts_of, set_parts

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
_PEFT_PREFIX = "base_model.model."
_PREFIXES = (_PEFT_PREFIX, "transformer.", "diffusion_model.", "lora_transformer.")
_FLAT_PREFIXES = ("lora_transformer_", "lycoris_", "lora_unet_")  # before a name with underscores for dots
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<down>lora_A(\.[^.]+)?\.weight|lora_down\.weight|lora(_linear_layer)?\.down\.weight)|"
    r"(?P<up>lora_B(\.[^.]+)?\.weight|lora_up\.weight|lora(_linear_layer)?\.up\.weight)|"
    r"(?P<alpha>(lora\.)?alpha)|"
    r"(?P<magnitude>lora_magnitude_vector(\.[^.]+){0,2}|dora_scale|magnitude)|"
    r"(?P<lycoris>lokr_w[12](_[ab])?|hada_w[12]_[ab]))"
)
_PLAIN = "not drawn here: train a plain LoRA"
_TYPE_NAMES: Mapping[LoraType, str] = {"lora": "plain LoRA", "lokr": "LoKr", "loha": "LoHa"}
_IN_COMFYUI = "not drawn here: draw with it in ComfyUI, or train a plain LoRA"
_TEXT_ENCODERS = "holds LoRA layers of text encoders, without which the picture would be another, and which are "
# What a key that is not read says of its file, and what to do. The first that any such key fits is named.
_FOREIGN = (
    (r"\.(hada|lokr)_t\d$", "is a LyCORIS LoHa or LoKr with a Tucker decomposition, which is " + _IN_COMFYUI),
    (r"\.(oft_|boft_)", "is an OFT adapter, which is " + _IN_COMFYUI),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "is a LyCORIS GLoRA, which is " + _IN_COMFYUI),
    (r"\.lora_mid\.weight$", "is a LyCORIS LoCon with a Tucker decomposition, which is " + _IN_COMFYUI),
    (r"\.(on_input|ia3_l)", "is an IA3 adapter, which is " + _PLAIN),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "holds differences of whole weights, which are " + _IN_COMFYUI),
    (r"^lora_te\d?[._]", _TEXT_ENCODERS + _IN_COMFYUI + " without the text encoders"),
    (
        r"^(?=.*(lora|alpha)).*(text_encoder|clip_[lg]\.|t5xxl\.|text_model\.|encoder\.layers\.|encoder\.block\.)",
        _TEXT_ENCODERS + "not drawn here: draw with it in diffusers (pipeline.load_lora_weights), or train it again "
        "without --train_text_encoder",
    ),
    (
        r"^bundle_emb|^emb_params$|^string_to_param|^(clip_[lg]|t5xxl)$",
        "holds a textual inversion, which is not drawn here: draw with it in ComfyUI, or train a LoRA without it",
    ),
    (
        r"single_transformer_blocks|single_blocks|double_blocks",
        "was trained on Flux: give a LoRA of a Stable Diffusion 3 model",
    ),
    (
        r"^unet\.|(down|up|mid|input|output|middle)_blocks?[._]",
        "was trained on Stable Diffusion 1, 2 or XL: give a LoRA of a Stable Diffusion 3 model",
    ),
    (
        r"^lora_unet_(joint_blocks|context_embedder|[xty]_embedder|final_layer)",
        "has the layer names of sd-scripts (kohya), which are not read yet: draw with it in ComfyUI, or train it "
        "again here or with one of the programs in docs/loras.md",
    ),
    (
        r"^(diffusion_model\.|transformer\.)?(joint_blocks|[xty]_embedder|final_layer)\..*(lora|lokr|hada|alpha)",
        "has the layer names of the original SD3 (MMDiT, as ComfyUI's), which are not read yet: draw with it in "
        "ComfyUI, or train it again here or with one of the programs in docs/loras.md",
    ),
    (
        r"\.lora_(B|up)(\.[^.]+)?\.bias$",
        "has biases in its LoRA (PEFT's lora_bias), which are not drawn: train without",
    ),
    (
        r"^(model\.diffusion_model|first_stage_model|text_encoders)\.|^joint_blocks\.|\.base_layer\.|"
        r"^(base_model\.model\.|transformer\.)?[a-z_]+\.(?!.*lora).*(weight|bias)$",
        "holds whole weights, of a model or of layers trained in full beside a LoRA (PEFT's modules_to_save): give a "
        "LoRA alone as --lora; a whole model, in diffusers' format, is --pretrained_model_name_or_path",
    ),
)
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
        keys: by part: down, up and, in a DoRA, magnitude; or LyCORIS' own names.
        rank: of it.
        alpha: of it.
        in_features: of the layer.
        out_features: of the layer.
    """

    keys: Mapping[str, str]
    rank: int
    alpha: float
    in_features: int
    out_features: int

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
    """A LoRA file whose every tensor is known to fit a transformer.

    Attributes:
        path: the safetensors file.
        layers: by the names of the transformer's modules.
        record: what this project's training noted; empty for another program's file.
        has_effect: whether any change of a weight is other than zero.
    """

    path: Path
    layers: Mapping[str, LoraLayer]
    record: dict[str, Any]
    has_effect: bool

    @property
    def is_dora(self) -> bool:
        """Whether it has magnitudes (DoRA, arXiv 2402.09353)."""
        return any(layer.magnitude for layer in self.layers.values())

    @property
    def type(self) -> LoraType:
        """That of its layers, which is one."""
        return next(layer.type for layer in self.layers.values())

    @property
    def device_bytes(self) -> int:
        """The most that it takes on the device, in float32: its tensors, and what a layer works with.

        In a DoRA those are an identity `(in, in)`, and the weight, the difference and their sum, `(out, in)` each; in a
        LoKr and a LoHa less than three of the latter.
        """
        layers = self.layers.values() if self.is_dora or self.type != "lora" else ()
        identity = int(self.is_dora)
        working = [layer.in_features * (identity * layer.in_features + 3 * layer.out_features) for layer in layers]
        return self.path.stat().st_size + 4 * max(working, default=0)

    def identity(self) -> str:
        """Of its bytes; and of how they are read, where that is not plainly with alpha = rank."""
        identity = hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]
        strengths = [[name, layer.alpha / layer.rank, bool(layer.magnitude)] for name, layer in self.layers.items()]
        if not self.is_dora and all(strength == 1 for _, strength, _ in strengths):
            return identity
        return f"{identity}/{hashlib.sha256(json.dumps(sorted(strengths)).encode()).hexdigest()[:8]}"

    def attach(self, transformer: SD3Transformer2DModel, name: str) -> None:
        """Adds the LoRA to a transformer as adapter `name`, in the base's dtype.

        Magnitudes stay in float32, and a LoKr and a LoHa, whose products are of small numbers.
        """
        with warnings.catch_warnings():  # PEFT's, that a second adapter makes several
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            if self.type != "lora":
                self._attach_lycoris(transformer, name)
                return
            transformer.add_adapter(self._config(), adapter_name=name)
        tensors = self._tensors()
        result = set_peft_model_state_dict(transformer, tensors, name)
        if result.unexpected_keys:
            raise RuntimeError(f"{self.path}: {result.unexpected_keys[0]} was not applied")
        for layer in self.layers if self.is_dora else ():
            magnitude = transformer.get_submodule(layer).lora_magnitude_vector[name].weight
            magnitude.data = tensors[f"{layer}.lora_magnitude_vector"].to(magnitude.device)

    def _attach_lycoris(self, transformer: SD3Transformer2DModel, name: str) -> None:
        settings = {"r": 1, "alpha": 1.0, "target_modules": list(self.layers)}
        add_lycoris(transformer, self.type, name, settings)
        for layer, tensors in self._lycoris_tensors().items():
            own = self.layers[layer]
            set_parts(transformer.get_submodule(layer), name, tensors, own.rank, own.alpha)

    def _lycoris_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Each layer's by part, in the order of `PARTS`."""
        with safe_open(self.path, "pt") as handle:
            return {
                name: {
                    part: handle.get_tensor(layer.keys[part]).float()
                    for part in PARTS[layer.type]
                    if part in layer.keys
                }
                for name, layer in self.layers.items()
            }

    def starts(self) -> dict[str, LayerStart]:
        """What training begins with, `start_from`, by the names of the transformer's modules."""
        if self.type != "lora":
            starts = {}
            for name, parts in self._lycoris_tensors().items():
                parts[list(parts)[-1]] *= self.layers[name].alpha / self.layers[name].rank
                starts[name] = LayerStart(torch.empty(0), torch.empty(0), None, parts)
            return starts
        tensors = self._tensors()
        return {
            name: LayerStart(
                tensors[f"{name}.lora_A.weight"],
                tensors[f"{name}.lora_B.weight"] * (layer.alpha / layer.rank),
                tensors.get(f"{name}.lora_magnitude_vector"),
            )
            for name, layer in self.layers.items()
        }

    def _config(self) -> LoraConfig:
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        alphas = {name: layer.alpha for name, layer in self.layers.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config = LoraConfig(
            r=int(rank),
            lora_alpha=alpha,
            rank_pattern=peft_patterns(ranks, rank),
            alpha_pattern=peft_patterns(alphas, alpha),
            use_dora=self.is_dora,
            target_modules=list(self.layers),
        )
        # PEFT asks after quantized layers of other libraries first, and raises where an old torchao is installed.
        config._register_custom_module({torch.nn.Linear: Linear})
        return config

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        with safe_open(self.path, "pt") as handle:
            for name, layer in self.layers.items():
                tensors[f"{name}.lora_A.weight"] = handle.get_tensor(layer.keys["down"]).float()
                tensors[f"{name}.lora_B.weight"] = handle.get_tensor(layer.keys["up"]).float()
                if layer.magnitude:
                    tensors[f"{name}.lora_magnitude_vector"] = handle.get_tensor(layer.magnitude).float().flatten()
        return tensors


def require_drawable(loras: Sequence[LoraFile], scales: Sequence[float], is_streamed: bool) -> None:
    """Checks what is asked of a DoRA, whose magnitudes belong to the whole weight and not to what is added.

    Raises:
        UserError: it is scaled, or beside another LoRA, or its weights are streamed.
    """
    for lora, scale in zip(loras, scales, strict=True):
        if not lora.is_dora:
            continue
        if scale != 1:
            raise UserError(f"{lora.path} is a DoRA, which has one strength: leave out --lora_scale {scale:g}")
        if len(loras) > 1:
            raise UserError(f"{lora.path} is a DoRA, which does not add up with other LoRAs: give one --lora alone")
        if is_streamed:
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
    if lora.type != kind.type:
        remedy = f"leave out --lora_type {kind.type}" if lora.type == "lora" else f"type --lora_type {lora.type}"
        raise UserError(f"{flag} is a {_TYPE_NAMES[lora.type]}, and this command trains another kind: {remedy}")
    for name in lora.layers:
        if name in ranks:
            continue
        if not name.startswith("transformer_blocks."):
            raise UserError(f"{flag} has a LoRA on {name}, which is not trained here: begin with another")
        wanted = sorted({each.split(".", 2)[2] for each in (*lora.layers, *ranks) if each.startswith("transformer_b")})
        raise UserError(
            f"{flag} has a LoRA on {name}, which this command does not train: type --lora_layers {','.join(wanted)} "
            "and leave out --lora_blocks"
        )
    if lora.type != "lora":  # `require_lycoris_start` compares their shapes
        return
    larger = {name: layer.rank for name, layer in lora.layers.items() if layer.rank > ranks[name]}
    for name, rank in larger.items():
        raise UserError(
            f"{flag} has a rank of {rank} on {name}, and this command {ranks[name]}: type --rank "
            f"{max(larger.values())} and leave out --rank_pattern"
        )
    if lora.is_dora and not kind.use_dora:
        raise UserError(f"{flag} is a DoRA: add --use_dora")


def require_lycoris_start(lora: LoraFile, transformer: SD3Transformer2DModel) -> None:
    """Checks that training can begin with a LoKr or a LoHa.

    Args:
        lora: to begin with, which `require_start` has seen.
        transformer: with what is to be trained, without weights.

    Raises:
        UserError: its parts have other shapes.
    """
    layers = lycoris_layers(transformer)
    with safe_open(lora.path, "pt") as handle:
        for name, layer in lora.layers.items():
            (trained,) = layers[name].active_adapters
            wanted = {part: list(tensor.shape) for part, tensor in parts_of(layers[name], trained).items()}
            found = {part: handle.get_slice(key).get_shape() for part, key in layer.keys.items() if part != "alpha"}
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


def read_lora_file(path: Path, transformer_config: Mapping[str, Any]) -> LoraFile:
    """Reads a LoRA's names, shapes and settings, and checks that each tensor fits the transformer and is finite.

    Args:
        path: the safetensors file. A PEFT adapter has its adapter_config.json beside it.
        transformer_config: of the model to draw with; nothing of the model is loaded.

    Raises:
        UserError: the file is not whole, of another model, or of a format that is not drawn.
    """
    record = read_lora_record(path)
    with safe_open(path, "pt") as handle:
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        widths = _layer_widths(transformer_config)
        keys_of_layers = _keys_of_layers(path, shapes, widths)
        settings = _read_settings(path, handle.metadata() or {}, shapes)
        layers: dict[str, LoraLayer] = {}
        for name, keys in keys_of_layers.items():
            in_features, out_features = _require_linear(path, name, widths[name])
            _require_shapes(path, name, keys, shapes, (in_features, out_features))
            rank = _rank_of(keys, shapes)
            written = float(handle.get_tensor(keys["alpha"])) if "alpha" in keys and rank else None
            alpha = settings.alpha(path, name, rank or 1, written)
            layers[name] = LoraLayer(keys, rank or 1, alpha, in_features, out_features)
        if len({layer.type for layer in layers.values()}) > 1:
            raise UserError(f"{path} has layers of several kinds, which are {_IN_COMFYUI}")
        magnitudes = [layer.magnitude for layer in layers.values()]
        if not all(magnitudes) and (any(magnitudes) or settings.use_dora):
            raise UserError(f"{path} is a DoRA that lacks magnitudes of some layers: save or download it again")
        has_effect = _require_finite(path, handle, shapes, layers)
    return LoraFile(path, layers, record, has_effect)


def _layer_widths(config: Mapping[str, Any]) -> dict[str, tuple[int, int] | None]:
    """The transformer's modules: features in and out of linear layers, None for all others."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    return {
        name: (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else None
        for name, module in transformer.named_modules()
        if name
    }


def _keys_of_layers(
    path: Path, keys: Mapping[str, Any], widths: Mapping[str, tuple[int, int] | None]
) -> dict[str, dict[str, str]]:
    """Each layer's keys by part: down, up, and maybe alpha and magnitude; or LyCORIS' own names, and maybe alpha."""
    flat = {name.replace(".", "_"): name for name in widths}
    layers: dict[str, dict[str, str]] = {}
    unread = []
    for key in keys:
        match = _KEY.fullmatch(key)
        name = _layer_name(match["layer"], widths, flat) if match else None
        if match is None or name is None:
            unread.append(key)
            continue
        part = match["lycoris"] or next(part for part in ("down", "up", "alpha", "magnitude") if match[part])
        if part in layers.setdefault(name, {}):
            raise UserError(f"{path} has two tensors for one place ({layers[name][part]}, {key}): give one LoRA a file")
        layers[name][part] = key
    if unread:
        raise UserError(f"{path} {_describe_foreign(unread)}")
    if not layers:
        raise UserError(f"{path} holds no tensor: it would have no effect")
    return layers


def _layer_name(written: str, widths: Mapping[str, Any], flat: Mapping[str, str]) -> str | None:
    name = written
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name in widths:
        return name
    return next(
        (flat.get(written.removeprefix(prefix)) for prefix in _FLAT_PREFIXES if written.startswith(prefix)), None
    )


def _describe_foreign(unread: Sequence[str]) -> str:
    """What the keys that are not read say of the file, and the remedy."""
    for pattern, sentence in _FOREIGN:
        key = next((key for key in unread if re.search(pattern, key)), None)
        if key:
            return f"{sentence} (its tensor {key})"
    key = unread[0]
    if _KEY.fullmatch(key) and re.search(r"transformer_blocks[._]\d", key):
        return f"was trained on another model ({key} does not fit): give its own base model"
    return f"has the tensor {key}, which is of no LoRA format known here: docs/loras.md lists those that are drawn"


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
            raise UserError(f"{path} has a LyCORIS LoKr or LoHa with {of} ({key}), which is {_IN_COMFYUI}")
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
    if "down" not in keys or "up" not in keys:
        present = next(iter(keys.values()))
        raise UserError(f"{path} lacks a part of the LoRA of {name} (it has {present}): save or download it again")
    down, up = shapes[keys["down"]], shapes[keys["up"]]
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise UserError(f"{path}: {keys['down']} and {keys['up']} do not fit together: save or download it again")
    if (down[1], up[0]) != widths:
        key = keys["down"] if down[1] != widths[0] else keys["up"]
        raise UserError(f"{path} was trained on another model ({key} does not fit): give its own base model")
    magnitude = keys.get("magnitude")
    if magnitude and shapes[magnitude] not in ((widths[1],), (widths[1], 1)):
        raise UserError(
            f"{path} is a DoRA with magnitudes of the layers' inputs ({magnitude}), as OneTrainer writes it by "
            "default, and older LyCORIS, which is " + _IN_COMFYUI
        )


def _require_finite(path: Path, handle: Any, keys: Mapping[str, Any], layers: Mapping[str, LoraLayer]) -> bool:
    """Reads each tensor once; returns whether any changes a picture.

    Raises:
        UserError: a NaN or an infinity, or a tensor of whole numbers.
    """
    zeros = set()
    for key in keys:
        tensor = handle.get_tensor(key)
        if not tensor.is_floating_point() and not key.endswith("alpha"):
            raise UserError(f"{path}: {key} is quantized ({tensor.dtype}), which is not read: give the LoRA in 16 bits")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{path} has NaN or infinity in {key}: use an earlier checkpoint of its training, or train again at a "
                "lower --learning_rate"
            )
        if not tensor.float().any():
            zeros.add(key)
    return any(
        bool(layer.magnitude) or (layer.alpha != 0 and zeros.isdisjoint(layer.keys.values()))
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


def _read_settings(path: Path, metadata: Mapping[str, str], keys: Mapping[str, Any]) -> _Settings:
    """PEFT's configuration: of an adapter folder, or in the metadata as diffusers writes it.

    Raises:
        UserError: it cannot be read, or asks for what is not drawn.
    """
    is_adapter = any(key.startswith(_PEFT_PREFIX) for key in keys)
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
    own = {key.removeprefix("transformer."): value for key, value in settings.items() if key.startswith("transformer.")}
    settings = own or {key: value for key, value in settings.items() if not key.startswith("text_encoder")}
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
        raise UserError(f"{source} is of PEFT's {kind}, which is {_PLAIN}")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{source} says init_lora_weights {start}, which fits a base that it changed: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    usual = LoraConfig().to_dict()
    for name, value in settings.items():
        if value and value != usual.get(name) and name not in _HARMLESS_SETTINGS:
            raise UserError(f"{source} says {name} {value}, which is {_PLAIN}")
