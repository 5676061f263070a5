#!/usr/bin/env bash
# peft 0.21.0, torch 2.13.0: with two DoRA adapters active, the order in which they are listed decides the output.
#
# One would have sworn that adapters add up, as plain LoRAs do, in any order. Seen instead: the second DoRA scales the
# output that the first has already changed, so ["one", "two"] and ["two", "one"] are two models, and neither is the base
# with both changes. Freshly made DoRAs hide it, since their magnitudes still are the norms; trained ones show it.
#
# Output seen:
#   LoRA: order changes the output by 0.00, distance from the sum of both changes 0.00
#   DoRA: order changes the output by 0.47, distance from the sum of both changes 0.30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model


def output(use_dora: bool, adapters: list[str]) -> torch.Tensor:
    """Of one layer with two adapters, of which these are active, in this order."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    if not adapters:
        return base(torch.ones(1, 8)).detach()
    config = LoraConfig(r=2, target_modules=["0"], use_dora=use_dora, init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.5)  # as training moves them
    model.base_model.set_adapter(adapters)
    return model(torch.ones(1, 8)).detach()


for kind, use_dora, order, distance in (("LoRA", False, "0.00", "0.00"), ("DoRA", True, "0.47", "0.30")):
    both, reversed_ = output(use_dora, ["one", "two"]), output(use_dora, ["two", "one"])
    added = output(use_dora, ["one"]) + output(use_dora, ["two"]) - output(use_dora, [])
    found = [f"{float((other - both).norm() / both.norm()):.2f}" for other in (reversed_, added)]
    print(f"{kind}: order changes the output by {found[0]}, distance from the sum of both changes {found[1]}")
    assert found == [order, distance], found
PYTHON
