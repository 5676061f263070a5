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
from peft import LoHaConfig, LoKrConfig
from peft.tuners import loha, lokr
from peft.tuners.loha import LoHaModel
from peft.tuners.lokr import LoKrModel
from torch.nn.functional import linear

# Their tensors' names in PEFT and in LyCORIS. The last of each is zero in a new one, and has the strength in a file.
PARTS: dict[LoraType, tuple[str, ...]] = {
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w2"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_b", "hada_w2_a"),
}
# As LyCORIS' own networks of a diffusers model are named, and SimpleTuner's; ComfyUI has both in its list for SD3.
_FILE_PREFIX = "lycoris_"


class _WithoutTheProduct:
    """The forward of both kinds: peft's numbers, but for rounding, and no random draw.

    It makes no matrix `(out, in)`, but for a LoHa of a high rank. peft makes it in each forward, multiplies with it as
    with the base's, and keeps it for backward. It also draws a number for a dropout that is not asked for, on the host,
    which a CUDA graph cannot hold.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        rows: torch.Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self._available_adapters:
                low, up = self._factors(x.to(rows.dtype), adapter)
                # Not in place: bitsandbytes' result must not be changed.
                added = torch.addmm(
                    rows.reshape(-1, len(up)),
                    low.reshape(-1, up.shape[1]),
                    up.to(rows.dtype).t(),
                    alpha=self.scaling[adapter],
                )
                rows = added.view(rows.shape)
        return rows


class AddedLokr(_WithoutTheProduct, lokr.Linear):
    """`W x + s (w1 ⊗ w2) x`."""

    def _factors(self, x: torch.Tensor, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What `(..., in)` is multiplied to with `w1` and the inner half of `w2`; and the outer half, `(b, k)`."""
        w1 = self.lokr_w1[adapter] if adapter in self.lokr_w1 else self.lokr_w1_a[adapter] @ self.lokr_w1_b[adapter]
        if adapter in self.lokr_w2_a:  # w1 ⊗ (A B) = (1 ⊗ A) (w1 ⊗ B)
            down = torch.kron(w1, self.lokr_w2_b[adapter])  # (a rank, in)
            return linear(x, down.to(x.dtype)), self.lokr_w2_a[adapter]
        w2 = self.lokr_w2[adapter]
        groups = x.reshape(-1, w1.shape[1], w2.shape[1])  # (rows, c, d)
        return torch.bmm(w1.to(x.dtype).expand(len(groups), -1, -1), groups), w2


class AddedLoha(_WithoutTheProduct, loha.Linear):
    """`W x + s (A₁ B₁ ∘ A₂ B₂) x`. It begins as LyCORIS': peft's start learns a hundredth as fast at a rate.

    There the first product has entries of about 0.01, by which every change of the second is multiplied, here of 0.3.
    """

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        """With the layer's widths: `shape`, of its weight, is another in 4 bits."""
        super().create_adapter_parameters(adapter_name, r, (self.out_features, self.in_features))

    def reset_adapter_parameters(self, adapter_name: str) -> None:
        """A start that adds nothing."""
        torch.nn.init.normal_(self.hada_w1_b[adapter_name], std=1)
        torch.nn.init.normal_(self.hada_w1_a[adapter_name], std=0.1)
        torch.nn.init.normal_(self.hada_w2_b[adapter_name], std=1)
        torch.nn.init.zeros_(self.hada_w2_a[adapter_name])

    def _factors(self, x: torch.Tensor, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A product `(out, rank²) (rank², in)` is the same: of rank `rank²`, cheaper than the whole where that is less.

        Each of its columns is one of `A₁` times one of `A₂`, and each row likewise.
        """
        (a1, b1), (a2, b2) = (
            (self.hada_w1_a[adapter], self.hada_w1_b[adapter]),
            (self.hada_w2_a[adapter], self.hada_w2_b[adapter]),
        )
        if len(b1) * len(b2) * (len(a1) + b1.shape[1]) > len(a1) * b1.shape[1]:
            return x, (a1 @ b1) * (a2 @ b2)
        down = (b1[:, None] * b2[None]).flatten(0, 1)
        return linear(x, down.to(x.dtype)), (a1[:, :, None] * a2[:, None]).flatten(1)


class _LokrModel(LoKrModel):
    layers_mapping = {torch.nn.Linear: AddedLokr}  # noqa: RUF012


class _LohaModel(LoHaModel):
    layers_mapping = {torch.nn.Linear: AddedLoha}  # noqa: RUF012


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
    if kind == "lokr":
        config = LoKrConfig(**settings, decompose_factor=factor, init_weights="lycoris")
        _LokrModel(transformer, config, adapter)
    else:
        _LohaModel(transformer, LoHaConfig(**settings), adapter)
    transformer._hf_peft_config_loaded = True  # as add_adapter does, which has no way to name our layers


def lycoris_layers(transformer: SD3Transformer2DModel) -> dict[str, Any]:
    """The layers that have a LoKr or a LoHa, by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, AddedLokr | AddedLoha)}


def parts_of(layer: Any, adapter: str) -> dict[str, torch.nn.Parameter]:
    """A layer's tensors, by PEFT's and LyCORIS' names, in the order of `PARTS`."""
    names = PARTS["lokr" if isinstance(layer, AddedLokr) else "loha"]
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
