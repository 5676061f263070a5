"""The layers that PEFT puts in the place of linear ones: of a LoRA, of a LoKr and of a LoHa; attached, and used.

To be imported where one is attached: PEFT's import takes longer than torch's, and a LoRA that is merged needs no layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd3_lora.common.lean_imports import import_peft, without_bitsandbytes
from sd3_lora.transformer.lora import ADAPTER, LayerStart

import torch
from torch.nn.functional import linear, pad

import_peft()

from peft import PeftConfig, inject_adapter_in_model
from peft.tuners import loha, lokr
from peft.tuners.loha import LoHaModel
from peft.tuners.lokr import LoKrModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight


def add_adapter(model: torch.nn.Module, config: PeftConfig, name: str = ADAPTER) -> None:
    """Adds an adapter to a model, and has the model use it alone.

    Args:
        model: whose layers get it.
        config: of PEFT.
        name: of the adapter.
    """
    with without_bitsandbytes():
        inject_adapter_in_model(config, model, name)
    note_adapter(model)
    use_adapters(model, [name])


def note_adapter(model: Any) -> None:
    """Has the model's own methods, diffusers' or transformers', know that it has adapters, as their add_adapter does.

    Theirs are not used to attach: they have no way to name our layers, and diffusers' are without PEFT in a script.
    """
    model._hf_peft_config_loaded = True


def tuner_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    """The layers of a model that PEFT added to."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def use_adapters(model: torch.nn.Module, names: list[str]) -> None:
    """Has a model use these adapters and no other."""
    for layer in tuner_layers(model):
        layer.set_adapter(names)


def use_strengths(model: torch.nn.Module, strengths: Mapping[str, float] | None) -> None:
    """Has a model use adapters with these strengths, a factor of their own each; None for the model without any."""
    for layer in tuner_layers(model):
        layer.enable_adapters(strengths is not None)
        if strengths is not None:
            layer.set_adapter(list(strengths))
            for name, strength in strengths.items():
                layer.set_scale(name, strength)


class AddedLora(Linear):
    """peft's layer, which gives `W x + s B A x`, with the last product, its scale and the sum in one call.

    peft takes a kernel for each, and writes three tensors of the output's size. In float32 the numbers are peft's but
    for rounding; in 16 bits this rounds once, where peft does three times. On a GPU a rank of 4 is multiplied as one of
    8, with zeros: tensor cores take rows of 16 bytes.

    That is for one LoRA. What else peft's layers can be asked for, peft's own forward does: adapters that are switched
    off, merged, several, of another kind, or chosen row by row.

    Two kinds are computed here otherwise than in peft:

    - PiSSA and OLoRA leave the base's weights alone. Their start `B₀ A₀`, frozen, is subtracted in each forward:
      `W x + s (B A - B₀ A₀) x`. So a 16-bit base is not rounded anew, and is what is left where the adapter is off.
    - DoRA's norms are computed in float32, without peft's identity `(in, in)`, and the difference to a magnitude is
      added: in 16 bits a new DoRA changes nothing.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if not self._is_one_lora() or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        product: torch.Tensor = self.base_layer(x)
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if self.start is not None:
            down, up = torch.cat((down, self.start[0])), torch.cat((up, -self.start[1]), dim=1)
        spare = _spare_rank(len(down), x.device)
        if spare:
            down, up = pad(down, (0, 0, 0, spare)), pad(up, (0, spare))
        low = linear(self.lora_dropout[adapter](x), down).flatten(0, -2)
        # Not in place: bitsandbytes' result must not be changed.
        rows = torch.addmm(product.flatten(0, -2), low, up.t(), alpha=self.scaling[adapter])
        if adapter in self.lora_magnitude_vector:
            rows = self._with_magnitudes(rows, adapter)
        return rows.view(product.shape)

    @property
    def start(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(rank, in)` and `(out, rank)`, whose product is subtracted; None where the LoRA starts at zero."""
        return (self.start_A, self.start_B) if "start_A" in self._buffers else None

    @property
    def matrices(self) -> list[torch.Tensor]:
        """Of the LoRA that is trained, and of its start."""
        return [self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, *(self.start or ())]

    def subtract_start(self) -> None:
        """Has what `lora_A` and `lora_B` are now subtracted from now on."""
        self.register_buffer("start_A", self.lora_A[ADAPTER].weight.detach().clone(), persistent=False)
        self.register_buffer("start_B", self.lora_B[ADAPTER].weight.detach().clone(), persistent=False)

    @torch.no_grad()
    def row_norms(self, adapter: str) -> torch.Tensor:
        """The norm of each row of `W + s B A`, `(out,)` in float32: DoRA's first magnitudes."""
        base = self.get_base_layer()
        # peft's function asks after names, which would cut a compiled block in two.
        weight = dequantize_module_weight(base) if hasattr(base.weight, "quant_state") else base.weight
        product = self.lora_B[adapter].weight @ self.lora_A[adapter].weight
        return torch.linalg.vector_norm(weight.float() + self.scaling[adapter] * product.float(), dim=1)

    def _with_magnitudes(self, rows: torch.Tensor, adapter: str) -> torch.Tensor:
        magnitudes = self.lora_magnitude_vector[adapter].weight
        change = (magnitudes / self.row_norms(adapter) - 1).to(rows.dtype)
        bias = self.get_base_layer().bias
        return torch.addcmul(rows, rows if bias is None else rows - bias, change)

    def _is_one_lora(self) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (adapter,) = self.active_adapters
        if adapter not in self.lora_A:
            return False
        return adapter in self.lora_magnitude_vector or adapter not in self.lora_variant


@torch.no_grad()
def scale_inputs(layer: Linear, adapter: str, start: LayerStart) -> None:
    """Multiplies what peft's layer gets with `m / |W + s B A|`, by columns: a DoRA whose magnitudes are of the inputs.

    Nothing of that is trained, so the norms are computed once. Where the adapter is off, the layer is the base's.
    """
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base) if hasattr(base.weight, "quant_state") else base.weight
    merged = weight.float() + (start.up @ start.down).to(weight.device)
    assert start.magnitudes is not None
    factors = start.magnitudes.to(weight.device) / torch.linalg.vector_norm(merged, dim=0)
    layer.register_buffer(f"input_factors_{adapter}", factors, persistent=False)

    def multiply(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if module.disable_adapters or adapter not in module.active_adapters:
            return inputs
        x, *others = inputs
        return (x * module.get_buffer(f"input_factors_{adapter}").to(x.dtype), *others)

    layer.register_forward_pre_hook(multiply)


def _spare_rank(rank: int, device: torch.device) -> int:
    return -rank % 8 if device.type == "cuda" else 0


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


class LokrModel(LoKrModel):
    """PEFT's, with `AddedLokr` for linear layers."""

    layers_mapping = {torch.nn.Linear: AddedLokr}  # noqa: RUF012


class LohaModel(LoHaModel):
    """PEFT's, with `AddedLoha` for linear layers."""

    layers_mapping = {torch.nn.Linear: AddedLoha}  # noqa: RUF012
