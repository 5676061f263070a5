"""Experiment trackers: those that are installed, never a login prompt."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Sequence

# The modules of each tracker, of which one is enough.
_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "comet_ml": ("comet_ml",)}


def start_trackers(asked: Sequence[str]) -> list[str]:
    """The trackers that accelerate is to start; prints a sentence for each that cannot be.

    Args:
        asked: names, or `all` or `none`.
    """
    if "none" in asked:
        return []
    names = list(_MODULES) if "all" in asked else list(asked)
    usable = []
    for name in names:
        if any(importlib.util.find_spec(module) for module in _MODULES[name]):
            usable.append(name)
        elif name != "tensorboard" and "all" not in asked:
            print(f"{name} is not installed, so nothing is sent to it: type `pip install {name}` to have it")
    if "wandb" in usable and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"  # it would ask for a key on a terminal that may not be there
        print("wandb has no key, so it logs offline: type `wandb login`, or `wandb sync` afterwards")
    return usable


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
