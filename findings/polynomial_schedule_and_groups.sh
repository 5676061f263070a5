#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: the polynomial schedule reads the rate that the optimizer was made with
# (optimizer.defaults), not the rates of its parameter groups.
#
# One would have sworn that every group goes from its own rate to lr_end. Seen instead: only a group whose rate is the
# optimizer's ends at lr_end. One with a hundredth of it (a text encoder's, say) ends at a hundredth of lr_end. And
# groups that all have rates of their own are refused, or not, by the rate that no group has.
#
# Output seen:
#   rates at the end: 1e-07 1e-09
#   all groups at 1e-3, optimizer made with 1e-8: ValueError
#   all groups at 1e-8, optimizer made with 1e-3: no error, the rate falls from 1e-08 to 1e-12
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers.optimization import get_scheduler


def rates(made_with: float, *groups: float) -> tuple[list[float], list[float]]:
    """The groups' rates before the first step and after the last of ten."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in groups]
    optimizer = torch.optim.AdamW(parameters, lr=made_with)
    schedule = get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=10)
    first = schedule.get_last_lr()
    for _ in range(10):
        optimizer.step()
        schedule.step()
    return first, schedule.get_last_lr()


_, last = rates(1e-3, 1e-3, 1e-5)
print("rates at the end:", *(f"{rate:.0e}" for rate in last))
assert [f"{rate:.0e}" for rate in last] == ["1e-07", "1e-09"], last

try:
    rates(1e-8, 1e-3, 1e-3)
except ValueError:
    print("all groups at 1e-3, optimizer made with 1e-8: ValueError")
else:
    raise SystemExit("changed: no error")

first, last = rates(1e-3, 1e-8)
print(f"all groups at 1e-8, optimizer made with 1e-3: no error, the rate falls from {first[0]:.0e} to {last[0]:.0e}")
assert (f"{first[0]:.0e}", f"{last[0]:.0e}") == ("1e-08", "1e-12"), (first, last)
PYTHON
