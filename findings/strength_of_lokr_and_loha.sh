#!/usr/bin/env bash
# peft 0.21.0, lycoris-lora 4.1.3, torch 2.13.0: the strength alpha / rank of one LoKr or LoHa, counted 0, 1 or 2 times.
#
# One would have sworn that the same tensors and the same alpha are the same change of a weight everywhere. Seen instead:
# - LyCORIS' merge_to and get_diff_weight multiply a LoKr and a LoHa with alpha / rank twice, its forward once;
# - of a LoKr whose matrices are both whole (a rank of half of them or more), LyCORIS' strength is 1 whatever the alpha,
#   as in ComfyUI and in diffusers' loader of LoKr; PEFT, which trains it, has alpha / rank.
# Where alpha is the rank nobody notices. A LoCon is right everywhere.
#
# Output seen, of what is added to a weight, as a multiple of what alpha = rank adds, at alpha / rank = 1/4:
#   LoCon: LyCORIS forward 0.25, merged 0.25
#   LoHa: LyCORIS forward 0.25, merged 0.06, PEFT 0.25
#   LoKr: LyCORIS forward 0.25, merged 0.06, PEFT 0.25
#   LoKr of whole matrices: LyCORIS forward 1.00, merged 1.00, PEFT 0.25
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.0 lycoris-lora==4.1.3
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig, get_peft_model
from torch.nn.functional import linear

torch.set_grad_enabled(False)
WIDTH, X = 256, torch.randn(1, 256, generator=torch.Generator().manual_seed(0))


def added(module_class: type, rank: int, alpha: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A module of LyCORIS', what it adds to an output, and what its difference of the weight does."""
    torch.manual_seed(0)
    base = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    module = module_class("layer", base, lora_dim=rank, alpha=alpha)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    difference, _ = module.get_diff_weight(1.0, shape=base.weight.shape)
    return module, module(X) - base(X), linear(X, difference)


def added_by_peft(config: LoKrConfig | LoHaConfig, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False)), config)
    layer = model.base_model.model[0]
    for name, tensor in tensors.items():
        if name.startswith(("lokr", "hada")):
            getattr(layer, name)["default"].data.copy_(tensor)
    return linear(X, layer.get_delta_weight("default"))


for name, module_class, config_class, rank, expected in (
    ("LoCon", LoConModule, None, 4, ["0.25", "0.25"]),
    ("LoHa", LohaModule, LoHaConfig, 4, ["0.25", "0.06", "0.25"]),
    ("LoKr", LokrModule, LoKrConfig, 4, ["0.25", "0.06", "0.25"]),
    ("LoKr of whole matrices", LokrModule, LoKrConfig, 64, ["1.00", "1.00", "0.25"]),
):
    _, whole, _ = added(module_class, rank, rank)
    module, forward, merged = added(module_class, rank, rank // 4)
    changes = {"LyCORIS forward": forward, "merged": merged}
    if config_class:
        config = config_class(r=rank, alpha=rank // 4, target_modules=["0"])
        changes["PEFT"] = added_by_peft(config, module.state_dict())
    found = [f"{float(change.norm() / whole.norm()):.2f}" for change in changes.values()]
    print(f"{name}: " + ", ".join(f"{who} {times}" for who, times in zip(changes, found, strict=True)))
    assert found == expected, found
PYTHON
