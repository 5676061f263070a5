"""Checks of the tensors in a LoRA file: whether they fit together, their layer, and are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sd3_lora.common.checksums import Checksums, DamagedError
from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.lora_keys import IN_COMFYUI
from sd3_lora.transformer.lycoris import PARTS, ROW_PARTS, misfit
from sd3_lora.transformer.original_layers import OriginalPlace

import torch


def require_parts_of_rows(
    path: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], place: OriginalPlace
) -> None:
    """Checks that a LoKr or a LoHa of a joined layer is one of each of its parts.

    Raises:
        UserError: it is not.
    """
    pieces = place.parts * (2 if place.is_swapped else 1)
    for key in (keys[part] for part in ROW_PARTS if part in keys):
        if shapes[key][0] % pieces:
            raise UserError(
                f"{path} is a LoKr of q, k and v as one layer, and {key} is not made of {pieces} like parts, which is "
                f"{IN_COMFYUI}"
            )


def require_linear(path: Path, name: str, widths: tuple[int, int] | None) -> tuple[int, int]:
    """The features that a layer takes and gives.

    Raises:
        UserError: the LoRA is on no linear layer.
    """
    if widths is None:
        raise UserError(
            f"{path} has a LoRA on {name}, which is no linear layer, and is not drawn here: draw with it in ComfyUI, "
            "or train it again on linear layers alone"
        )
    return widths


def rank_of(keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
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


def require_shapes(
    path: Path,
    name: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    widths: tuple[int, int],
) -> None:
    """Checks that a layer's tensors fit together, and its widths.

    Args:
        path: of the file.
        name: of the layer.
        keys: of its tensors, by part.
        shapes: of all tensors.
        widths: features that the layer takes and gives.

    Raises:
        UserError: they do not.
    """
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


def require_finite(path: Path, handle: Any, keys: Iterable[str]) -> None:
    """Checks every tensor.

    Raises:
        UserError: a NaN or an infinity, a tensor of whole numbers, or one that is not what this project wrote.
    """
    try:
        sums = Checksums(handle)
        for key in keys:
            sums.require(key, handle.get_tensor(key))
    except DamagedError as error:
        raise UserError(
            f"{path} is damaged, {error}: delete it and type its training's command again with "
            "--resume_from_checkpoint latest, which writes it anew, or give a checkpoint's folder"
        ) from error
    for key in keys:
        tensor = handle.get_tensor(key)
        if not tensor.is_floating_point() and not key.endswith("alpha"):
            raise UserError(f"{path}: {key} is quantized ({tensor.dtype}), which is not read: give the LoRA in 16 bits")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{path} has NaN or infinity in {key}: use an earlier checkpoint of its training, or train again at a "
                "lower --learning_rate"
            )
