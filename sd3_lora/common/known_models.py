"""The configurations of the published SD3 models, for `--plan`.

A plan needs shapes and no weights, and a configuration gives them. So `--plan` answers for these models without an
account, a download or a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONFIGS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# The names that diffusers' documents have for them → their ids on the hub.
HUB_IDS: dict[str, str] = _CONFIGS["hub_ids"]


def known_configs(hub_id: str | None) -> dict[str, dict[str, Any]] | None:
    """The config.json of each component of a model that is known; None of any other."""
    for name, known_id in HUB_IDS.items():
        if known_id == hub_id:
            return {**_CONFIGS["shared"], "transformer": _CONFIGS["transformers"][name]}
    return None
