"""What the names in a LoRA file say: which layer of which model a tensor changes, and how; or whose file it is.

Programs name the transformer's layers as diffusers does, or as the original SD3 (MMDiT) does, where q, k and v are one
layer; with dots or with underscores for them; behind a prefix of their own. The CLIPs' layers have the same names
everywhere, those of transformers, and the prefix tells which of the two it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.original_layers import OriginalPlace, original_places

import torch
from diffusers import SD3Transformer2DModel

PEFT_PREFIX = "base_model.model."
_PREFIXES = (PEFT_PREFIX, "transformer.", "diffusion_model.", "lora_transformer.")
_FLAT_PREFIXES = ("lora_transformer_", "lycoris_", "lora_unet_")  # before a name with underscores for dots
TRANSFORMER, CLIPS = "transformer", ("text_encoder", "text_encoder_2")  # a pipeline's names of its models
# Of each CLIP, before a name with dots: diffusers', OneTrainer's and ai-toolkit's, OneTrainer's OMI, ComfyUI's.
_CLIP_PREFIXES = {
    "text_encoder": ("text_encoder.", "lora_te1.", "clip_l.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("text_encoder_2.", "lora_te2.", "clip_g.", "text_encoders.clip_g.transformer."),
}
# Before a name with underscores: sd-scripts' and OneTrainer's; A1111's.
FLAT_CLIP_PREFIXES = {
    "text_encoder": ("lora_te1_", "clip_l_transformer_"),
    "text_encoder_2": ("lora_te2_", "clip_g_transformer_"),
}
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<down>lora_A(\.[^.]+)?\.weight|lora_down\.weight|lora(_linear_layer)?\.down\.weight)|"
    r"(?P<up>lora_B(\.[^.]+)?\.weight|lora_up\.weight|lora(_linear_layer)?\.up\.weight)|"
    r"(?P<alpha>(lora\.)?alpha)|"
    r"(?P<magnitude>lora_magnitude_vector(\.[^.]+){0,2}|dora_scale|magnitude)|"
    r"(?P<diff>diff)|"
    r"(?P<bias>lora_B(\.[^.]+)?\.bias|lora_up\.bias|diff_b)|"
    r"(?P<lycoris>lokr_w[12](_[ab])?|hada_w[12]_[ab]))"
)
PLAIN = "not drawn here: train a plain LoRA"
IN_COMFYUI = "not drawn here: draw with it in ComfyUI, or train a plain LoRA"
_WITHOUT = ", without which the picture would be another, and which are not drawn here: draw with it in "
# What a key that is not read says of its file, and what to do. The first that any such key fits is named.
_FOREIGN = (
    (r"\.(hada|lokr)_t\d$", "is a LyCORIS LoHa or LoKr with a Tucker decomposition, which is " + IN_COMFYUI),
    (r"\.(oft_|boft_)", "is an OFT adapter, which is " + IN_COMFYUI),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "is a LyCORIS GLoRA, which is " + IN_COMFYUI),
    (r"\.(q_layer\.weight|p_layer\.weight|lambda_layer)$", "is a LyCORIS T-LoRA, which is " + PLAIN),
    (r"\.lora_mid\.weight$", "is a LyCORIS LoCon with a Tucker decomposition, which is " + IN_COMFYUI),
    (r"\.(on_input|ia3_l)", "is an IA3 adapter, which is " + PLAIN),
    (r"\.(w_norm|b_norm|set_weight)$", "holds weights of norms, or whole ones in place of the base's, " + IN_COMFYUI),
    (
        r"^lora_te3[._]|^(?=.*(lora|alpha|lokr|hada|diff)).*(text_encoder_3|t5|t5xxl)\.",
        "holds LoRA layers of T5" + _WITHOUT + "ComfyUI, or train it again on the CLIPs alone",
    ),
    (
        r"^bundle_emb|^emb_params$|^string_to_param|^(clip_[lg]|t5xxl)$",
        "holds a textual inversion, which is no LoRA: give it to --identifier_embedding where it was trained here; "
        "draw with another in ComfyUI",
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
        r"^lora_te_|^(?=.*(lora|alpha|lokr|hada)).*(text_model|encoder)[._]",
        "holds LoRA layers of a text encoder by names that are not known here" + _WITHOUT + "the program that wrote it",
    ),
    (
        r"^(model\.diffusion_model|first_stage_model|text_encoders)\.|^joint_blocks\.|\.base_layer\.|"
        r"^(base_model\.model\.|transformer\.)?[a-z_]+\.(?!.*lora).*(weight|bias)$",
        "holds whole weights, of a model or of layers trained in full beside a LoRA (PEFT's modules_to_save): give a "
        "LoRA alone as --lora; a whole model, in diffusers' format, is --pretrained_model_name_or_path",
    ),
)
_PARTS = ("down", "up", "alpha", "magnitude", "diff", "bias")


@dataclass(frozen=True)
class LayerKeys:
    """The tensors of a file that change one layer.

    Attributes:
        place: which of their rows are the layer's, where they are of a layer of the original; None: all.
        keys: by part: down, up, alpha, magnitude, diff and bias; or LyCORIS' own names.
    """

    place: OriginalPlace | None
    keys: dict[str, str] = field(default_factory=dict)


def layer_widths(config: Mapping[str, Any], model: str = TRANSFORMER) -> dict[str, tuple[int, int] | None]:
    """A model's modules: features in and out of linear layers, None for all others.

    Args:
        config: of the model.
        model: which it is, `TRANSFORMER` or one of `CLIPS`.
    """
    with torch.device("meta"):
        if model == TRANSFORMER:
            made = SD3Transformer2DModel.from_config(config)
        else:
            from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # takes a second, and few need it

            made = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))
    return {
        name: (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else None
        for name, module in made.named_modules()
        if name
    }


def keys_of_models(keys: Iterable[str]) -> dict[str, list[str]]:
    """A file's keys by model, each model that has any; the transformer is first, and has what is of no CLIP."""
    found: dict[str, list[str]] = {model: [] for model in (TRANSFORMER, *CLIPS)}
    prefixes = {clip: _CLIP_PREFIXES[clip] + FLAT_CLIP_PREFIXES[clip] for clip in CLIPS}
    for key in keys:
        clip = next((clip for clip in CLIPS if key.startswith(prefixes[clip]) and _KEY.fullmatch(key)), None)
        found[clip or TRANSFORMER].append(key)
    return {model: own for model, own in found.items() if own}


def keys_of_layers(
    path: Path, keys: Iterable[str], widths: Mapping[str, tuple[int, int] | None], model: str = TRANSFORMER
) -> dict[str, LayerKeys]:
    """Each layer's tensors, by the names of the model's modules.

    Args:
        path: of the file, for messages.
        keys: its tensors' names, of this model alone.
        widths: of the model's layers, `layer_widths`.
        model: which it is.

    Raises:
        UserError: a tensor is of no layer, or of a format that is not read.
    """
    names = _written_names(widths) if model == TRANSFORMER else _names_in_clip(widths, model)
    layers: dict[str, LayerKeys] = {}
    unread = []
    for key in keys:
        match = _KEY.fullmatch(key)
        written = match["layer"] if match else ""
        targets = _targets(written, names) if model == TRANSFORMER else names.get(written, [])
        if match is None or not targets:
            unread.append(key)
            continue
        part = match["lycoris"] or next(part for part in _PARTS if match[part])
        for name, place in targets:
            layer = layers.setdefault(name, LayerKeys(place))
            if part in layer.keys or layer.place != place:
                other = layer.keys.get(part) or next(iter(layer.keys.values()))
                raise UserError(f"{path} has two tensors for one place ({other}, {key}): give one LoRA a file")
            layer.keys[part] = key
    if unread:
        raise UserError(f"{path} {_describe_foreign(unread, model)}")
    if not layers:
        raise UserError(f"{path} holds no tensor: it would have no effect")
    return layers


_Targets = list[tuple[str, OriginalPlace | None]]


def _written_names(widths: Mapping[str, Any]) -> dict[str, _Targets]:
    """The modules that each name of a layer stands for, without a prefix, with dots and with underscores."""
    named: dict[str, _Targets] = {"x_embedder.proj": [("pos_embed.proj", None)]}
    for name, place in original_places(widths).items():
        if place.layer not in widths:
            named.setdefault(place.layer, []).append((name, place))
        if place.parts > 1:  # OneTrainer's OMI form numbers them
            named[f"{place.layer}.{place.part}"] = [(name, None)]
    named |= {name: [(name, None)] for name in widths}
    return {name.replace(".", "_"): targets for name, targets in named.items()} | named


def _names_in_clip(widths: Mapping[str, Any], clip: str) -> dict[str, _Targets]:
    """A CLIP's modules by their names behind each prefix, with dots and with underscores."""
    dotted = {prefix + name: name for prefix in _CLIP_PREFIXES[clip] for name in widths}
    flat = {prefix + name.replace(".", "_"): name for prefix in FLAT_CLIP_PREFIXES[clip] for name in widths}
    return {written: [(name, None)] for written, name in (dotted | flat).items()}


def _targets(written: str, names: Mapping[str, _Targets]) -> _Targets:
    name = written
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if "." in name or name in names:
        return names.get(name, [])
    prefixes = (prefix for prefix in _FLAT_PREFIXES if written.startswith(prefix))
    return next((names[rest] for rest in map(written.removeprefix, prefixes) if rest in names), [])


def _describe_foreign(unread: Sequence[str], model: str) -> str:
    """What the keys that are not read say of the file, and the remedy."""
    if model in CLIPS:
        return f"was trained on another model ({unread[0]} does not fit): give its own base model"
    for pattern, sentence in _FOREIGN:
        key = next((key for key in unread if re.search(pattern, key)), None)
        if key:
            return f"{sentence} (its tensor {key})"
    key = unread[0]
    if _KEY.fullmatch(key) and re.search(r"(transformer|joint)_blocks[._]\d", key):
        return f"was trained on another model ({key} does not fit): give its own base model"
    return f"has the tensor {key}, which is of no LoRA format known here: docs/loras.md lists those that are drawn"
