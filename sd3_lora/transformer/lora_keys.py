"""What the names in a LoRA file say: which layer of the transformer a tensor changes, and how; or whose file it is.

Programs name layers as diffusers does, or as the original SD3 (MMDiT) does, where q, k and v are one layer; with dots
or with underscores for them; behind a prefix of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
_TEXT_ENCODERS = "holds LoRA layers of text encoders, without which the picture would be another, and which are "
# What a key that is not read says of its file, and what to do. The first that any such key fits is named.
_FOREIGN = (
    (r"\.(hada|lokr)_t\d$", "is a LyCORIS LoHa or LoKr with a Tucker decomposition, which is " + IN_COMFYUI),
    (r"\.(oft_|boft_)", "is an OFT adapter, which is " + IN_COMFYUI),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "is a LyCORIS GLoRA, which is " + IN_COMFYUI),
    (r"\.(q_layer\.weight|p_layer\.weight|lambda_layer)$", "is a LyCORIS T-LoRA, which is " + PLAIN),
    (r"\.lora_mid\.weight$", "is a LyCORIS LoCon with a Tucker decomposition, which is " + IN_COMFYUI),
    (r"\.(on_input|ia3_l)", "is an IA3 adapter, which is " + PLAIN),
    (r"\.(w_norm|b_norm|set_weight)$", "holds weights of norms, or whole ones in place of the base's, " + IN_COMFYUI),
    (r"^lora_te\d?[._]", _TEXT_ENCODERS + IN_COMFYUI + " without the text encoders"),
    (
        r"^(?=.*(lora|alpha)).*(text_encoder|clip_[lg]\.|t5(xxl)?\.|text_model\.|encoder\.layers\.|encoder\.block\.)",
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


def layer_widths(config: Mapping[str, Any]) -> dict[str, tuple[int, int] | None]:
    """The transformer's modules: features in and out of linear layers, None for all others."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    return {
        name: (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else None
        for name, module in transformer.named_modules()
        if name
    }


def keys_of_layers(
    path: Path, keys: Mapping[str, Any], widths: Mapping[str, tuple[int, int] | None]
) -> dict[str, LayerKeys]:
    """Each layer's tensors, by the names of the transformer's modules.

    Args:
        path: of the file, for messages.
        keys: its tensors' names.
        widths: of the transformer's layers, `layer_widths`.

    Raises:
        UserError: a tensor is of no layer, or of a format that is not read.
    """
    names = _written_names(widths)
    layers: dict[str, LayerKeys] = {}
    unread = []
    for key in keys:
        match = _KEY.fullmatch(key)
        targets = _targets(match["layer"], names) if match else []
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
        raise UserError(f"{path} {_describe_foreign(unread)}")
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


def _targets(written: str, names: Mapping[str, _Targets]) -> _Targets:
    name = written
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if "." in name or name in names:
        return names.get(name, [])
    prefixes = (prefix for prefix in _FLAT_PREFIXES if written.startswith(prefix))
    return next((names[rest] for rest in map(written.removeprefix, prefixes) if rest in names), [])


def _describe_foreign(unread: Sequence[str]) -> str:
    """What the keys that are not read say of the file, and the remedy."""
    for pattern, sentence in _FOREIGN:
        key = next((key for key in unread if re.search(pattern, key)), None)
        if key:
            return f"{sentence} (its tensor {key})"
    key = unread[0]
    if _KEY.fullmatch(key) and re.search(r"(transformer|joint)_blocks[._]\d", key):
        return f"was trained on another model ({key} does not fit): give its own base model"
    return f"has the tensor {key}, which is of no LoRA format known here: docs/loras.md lists those that are drawn"
