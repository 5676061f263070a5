"""The LoRA (Hu et al., arXiv 2106.09685): which layers, attach, save.

A saved file is diffusers' `pytorch_lora_weights.safetensors`. Its alpha is always its rank: alpha / rank is folded into
`lora_B` on saving, so that a reader that ignores the metadata draws the same picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.tensor_files import write_tensors

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.functional import linear, pad

LORA_FILE = "pytorch_lora_weights.safetensors"
# Both streams' attention projections, as in diffusers' train_dreambooth_lora_sd3.py.
DEFAULT_LAYERS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
_METADATA_KEY = "sd3_lora"
_PREFIX = "transformer."


def require_blocks(blocks: Sequence[int] | None, count: int) -> None:
    """Checks the indices of blocks that get a LoRA.

    Raises:
        UserError: the transformer, of `count` blocks, does not have one.
    """
    wrong = [block for block in blocks or () if not 0 <= block < count]
    if wrong:
        raise UserError(f"--lora_blocks {wrong[0]}: this transformer has the blocks 0 to {count - 1}")


def target_modules(
    transformer: SD3Transformer2DModel, layers: Sequence[str] | None, blocks: Sequence[int] | None
) -> list[str]:
    """The names of the modules that get a LoRA.

    Args:
        transformer: the model.
        layers: endings of module names inside a block, such as attn.to_k; None for `DEFAULT_LAYERS`.
        blocks: indices of transformer blocks; None for all.

    Raises:
        UserError: a layer or block that the model does not have.
    """
    require_blocks(blocks, len(transformer.transformer_blocks))
    linears = [
        name
        for name, module in transformer.transformer_blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and (blocks is None or int(name.split(".")[0]) in blocks)
    ]
    chosen: list[str] = []
    for layer in layers or DEFAULT_LAYERS:
        matching = [name for name in linears if name.endswith(f".{layer}")]
        if not matching and layers is not None:
            known = sorted({name.split(".", 1)[1] for name in linears})
            raise UserError(f"--lora_layers {layer} is in no block: the layers are {', '.join(known)}")
        chosen += matching
    return [f"transformer_blocks.{name}" for name in sorted(set(chosen))]


class AddedLora(Linear):
    """peft's layer, which gives `W x + s B A x`, with the last product, its scale and the sum in one call.

    peft takes a kernel for each, and writes three tensors of the output's size. In float32 the numbers are peft's but
    for rounding; in 16 bits this rounds once, where peft does three times. On a GPU a rank of 4 is multiplied as one of
    8, with zeros: tensor cores take rows of 16 bytes.

    That is for one plain LoRA. What else peft's layers can be asked for, peft's own forward does: adapters that are
    switched off, merged, several, of another kind, or chosen row by row.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if not self._is_one_plain_lora() or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        product: torch.Tensor = self.base_layer(x)
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        spare = _spare_rank(len(down), x.device)
        if spare:
            down, up = pad(down, (0, 0, 0, spare)), pad(up, (0, spare))
        low = linear(self.lora_dropout[adapter](x), down).flatten(0, -2)
        # Not in place: bitsandbytes' result must not be changed.
        rows = torch.addmm(product.flatten(0, -2), low, up.t(), alpha=self.scaling[adapter])
        return rows.view(product.shape)

    def _is_one_plain_lora(self) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (adapter,) = self.active_adapters
        return adapter in self.lora_A and adapter not in self.lora_variant


def _spare_rank(rank: int, device: torch.device) -> int:
    return -rank % 8 if device.type == "cuda" else 0


def attach_lora(
    transformer: SD3Transformer2DModel, targets: Sequence[str], rank: int, alpha: float, dropout: float, seed: int
) -> list[torch.nn.Parameter]:
    """Freezes the transformer, adds the LoRA and returns its parameters, in float32 whatever the base's dtype.

    `lora_A` is drawn from a Gaussian by `seed`, `lora_B` is zero.
    """
    transformer.requires_grad_(False)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=list(targets)
    )
    config._register_custom_module({torch.nn.Linear: AddedLora})
    transformer.add_adapter(config)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


@contextmanager
def lora_off(transformer: torch.nn.Module) -> Iterator[None]:
    """Within it the adapters are off, and the base alone computes.

    Not by peft's `enable_adapters`, which would freeze what is trained, and thaw it afterwards.
    """
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def lora_tensors(transformer: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """The LoRA as it is trained, float32 on the CPU; names as in peft."""
    return {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(transformer).items()
    }


def save_lora(
    folder: Path, transformer: SD3Transformer2DModel, rank: int, alpha: float, record: Mapping[str, Any]
) -> Path:
    """Writes diffusers' file atomically, reads it back and compares.

    Args:
        folder: where to write `pytorch_lora_weights.safetensors`.
        transformer: with the LoRA attached.
        rank: of the LoRA.
        alpha: of the LoRA; alpha / rank is folded into lora_B.
        record: base model, prompts and the like, kept in the metadata for inference.

    Raises:
        UserError: the weights are not finite: nothing is written.
        OSError: what was read back is not what was written.
    """
    tensors = {
        _PREFIX + name: tensor * (alpha / rank) if ".lora_B." in name else tensor
        for name, tensor in lora_tensors(transformer).items()
    }
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"the LoRA has NaN or infinity in {bad[0]}: not saved; lower --learning_rate and train again")
    targets = sorted({name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors})
    adapter = {"r": rank, "lora_alpha": rank, "target_modules": targets, "peft_type": "LORA"}
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps({_PREFIX + key: value for key, value in adapter.items()}),
        _METADATA_KEY: json.dumps({**record, "rank": rank}, ensure_ascii=False),
    }
    path = folder / LORA_FILE
    temporary = folder / f".{LORA_FILE}.{os.getpid()}"
    try:
        write_tensors(temporary, tensors, metadata)
        written = load_file(temporary)
        if written.keys() != tensors.keys() or any(not torch.equal(written[name], tensors[name]) for name in tensors):
            raise OSError(f"{path}: the disk returned other bytes than were written")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_lora_record(path: Path) -> dict[str, Any]:
    """The metadata that this project's training wrote into a LoRA; empty for a LoRA of another program.

    Raises:
        UserError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(path, "pt") as handle:
            return dict(json.loads((handle.metadata() or {}).get(_METADATA_KEY, "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: train again, or download it again") from error
