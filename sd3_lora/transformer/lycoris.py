"""LoKr and LoHa: LyCORIS' kinds of LoRA (Yeh et al., arXiv 2309.14859), as PEFT has them, for linear layers.

Shapes: a layer of `in = c d` to `out = a b` features gets

- LoKr: the Kronecker product of `lokr_w1 (a, c)` and `lokr_w2 (b, d)`, the second of which is, for a low rank, the
  product of `lokr_w2_a (b, rank)` and `lokr_w2_b (rank, d)`;
- LoHa: the elementwise product of `hada_w1_a (out, rank) @ hada_w1_b (rank, in)` and
  `hada_w2_a (out, rank) @ hada_w2_b (rank, in)`.

Either is multiplied with a strength, alpha / rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sd3_lora.common.config import LoraType

import torch
from diffusers import SD3Transformer2DModel

# Their tensors' names in PEFT and in LyCORIS. The last of each is zero in a new one, and has the strength in a file.
PARTS: dict[LoraType, tuple[str, ...]] = {
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w2"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_b", "hada_w2_a"),
}
# Those whose rows are the layer's outputs: a third of them is that third of the layer (of a LoKr, if it can be cut so).
ROW_PARTS = ("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a")
# As LyCORIS' own networks of a diffusers model are named, and SimpleTuner's; ComfyUI has both in its list for SD3.
_FILE_PREFIX = "lycoris_"


def add_lycoris(
    transformer: SD3Transformer2DModel, kind: LoraType, adapter: str, settings: Mapping[str, Any], factor: int = -1
) -> None:
    """Adds a new LoKr or LoHa, which changes nothing yet; drawn from torch's generator.

    Args:
        transformer: whose layers get it.
        kind: which of the two.
        adapter: its name.
        settings: PEFT's r, alpha, patterns and target_modules.
        factor: of a LoKr: a and c, or the divisors nearest below it; -1 for those nearest to the square root.
    """
    from sd3_lora.transformer.added_layers import LohaModel, LokrModel, note_adapter  # imports PEFT, as below

    from peft import LoHaConfig, LoKrConfig

    if kind == "lokr":
        config = LoKrConfig(**settings, decompose_factor=factor, init_weights="lycoris")
        LokrModel(transformer, config, adapter)
    else:
        LohaModel(transformer, LoHaConfig(**settings), adapter)
    note_adapter(transformer)


def lycoris_layers(transformer: SD3Transformer2DModel) -> dict[str, Any]:
    """The layers that have a LoKr or a LoHa, by name."""
    if not hasattr(transformer, "peft_config"):  # then nothing is attached, and PEFT is not imported for it
        return {}
    from sd3_lora.transformer.added_layers import AddedLoha, AddedLokr

    return {name: module for name, module in transformer.named_modules() if isinstance(module, AddedLokr | AddedLoha)}


def parts_of(layer: Any, adapter: str) -> dict[str, torch.nn.Parameter]:
    """A layer's tensors, by PEFT's and LyCORIS' names, in the order of `PARTS`."""
    names = PARTS["lokr" if hasattr(layer, "lokr_w1") else "loha"]
    return {name: getattr(layer, name)[adapter] for name in names if adapter in getattr(layer, name)}


@torch.no_grad()
def set_parts(layer: Any, adapter: str, tensors: Mapping[str, torch.Tensor], rank: int, alpha: float) -> None:
    """Replaces a layer's tensors, in float32 where the layer lies; their shapes may be any that fit it.

    Args:
        layer: of `lycoris_layers`.
        adapter: whose.
        tensors: by `PARTS`.
        rank: with alpha the strength, alpha / rank.
        alpha: likewise.
    """
    device = layer.get_base_layer().weight.device
    for name in parts_of(layer, adapter):
        del getattr(layer, name)[adapter]
    for name, tensor in tensors.items():
        getattr(layer, name)[adapter] = torch.nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)
    layer.r[adapter], layer.alpha[adapter] = rank, alpha
    layer.set_scale(adapter, 1.0)


def lycoris_file(transformer: SD3Transformer2DModel, adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, float32 on the CPU, with LyCORIS' names.

    Alpha is the rank: the strength is folded into the last part. Readers differ in where they apply another one.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lycoris_layers(transformer).items():
        flat = _FILE_PREFIX + name.replace(".", "_")
        parts = {part: tensor.detach().float().cpu().clone() for part, tensor in parts_of(layer, adapter).items()}
        parts[list(parts)[-1]] *= layer.scaling[adapter]
        tensors |= {f"{flat}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{flat}.alpha"] = torch.tensor(float(layer.r[adapter]))
    return tensors


def difference(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the parts of a layer add to its weight, `(out, in)`; without a strength."""

    def product(name: str) -> torch.Tensor:
        return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]

    if "hada_w1_a" in parts:
        return product("hada_w1") * product("hada_w2")
    return torch.kron(product("lokr_w1"), product("lokr_w2"))


def misfit(parts: Mapping[str, Sequence[int]], in_features: int, out_features: int) -> str | None:
    """The part of a layer in a file that is missing, or does not fit the others or the layer; None where all do.

    Args:
        parts: shapes by `PARTS`.
        in_features: of the layer.
        out_features: likewise.
    """
    names = ("hada_w1", "hada_w2") if any(part.startswith("hada") for part in parts) else ("lokr_w1", "lokr_w2")
    products: list[tuple[int, int]] = []
    ranks: set[int] = set()
    for name in names:
        pair = [parts.get(f"{name}_a"), parts.get(f"{name}_b")]
        whole = parts.get(name)
        shapes = [shape for shape in (whole, *pair) if shape is not None]
        if any(len(shape) != 2 or not min(shape) for shape in shapes):
            return name
        if whole is not None and len(shapes) == 1:
            products.append((whole[0], whole[1]))
        elif whole is None and pair[0] is not None and pair[1] is not None and pair[0][1] == pair[1][0]:
            products.append((pair[0][0], pair[1][1]))
            ranks.add(pair[1][0])
        else:
            return name
    (out_1, in_1), (out_2, in_2) = products
    found = [(out_1, in_1), (out_2, in_2)] if names[0] == "hada_w1" else [(out_1 * out_2, in_1 * in_2)]
    fits = all(product == (out_features, in_features) for product in found) and len(ranks) < 2
    return None if fits else names[1]
