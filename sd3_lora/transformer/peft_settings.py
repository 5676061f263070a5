"""PEFT's configuration of a LoRA: in an adapter's folder, or in a file's metadata as diffusers writes it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.lora_keys import PEFT_PREFIX, PLAIN, TRANSFORMER

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Settings of PEFT that change nothing in a picture, or that the tensors themselves show.
_HARMLESS_SETTINGS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "fan_in_fan_out", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "peft_version", "runtime_config", "eva_config", "lora_bias", "ensure_weight_tying"),
}
# Starts that leave the base weights as they are. The others (PiSSA, OLoRA, LoftQ, …) fit a changed base.
_PLAIN_STARTS = {"none", "true", "false", "gaussian", "eva", "orthogonal"}


@dataclass(frozen=True)
class PeftSettings:
    """What PEFT's configuration says of the strength; None or empty for a file without one."""

    lora_alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def alpha(self, path: Path, name: str, rank: int, written: float | None) -> float:
        """The alpha of a layer, for a strength of alpha / rank.

        A scalar beside the tensors is its alpha, else the configuration's, else the rank (strength 1).
        """
        configured = self.lora_alpha
        if self.alpha_pattern:
            from peft.utils.other import get_pattern_key  # its import takes seconds, and most files have no pattern

            configured = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), configured)
        if written is not None and configured is not None and not math.isclose(written, configured, rel_tol=1e-3):
            raise UserError(
                f"{path} says alpha {written:g} beside the tensors of {name} and {configured:g} in its metadata: save "
                "it again with one of them"
            )
        alpha = configured if configured is not None else written
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.use_rslora else float(alpha)


def read_peft_settings(path: Path, metadata: Mapping[str, str], keys: Iterable[str], model: str) -> PeftSettings:
    """PEFT's configuration for one model: of an adapter folder, or in the metadata as diffusers writes it.

    Raises:
        UserError: it cannot be read, or asks for what is not drawn.
    """
    is_adapter = any(key.startswith(PEFT_PREFIX) for key in keys)
    beside = path.with_name(PEFT_CONFIG)
    try:
        if (is_adapter or path.name == PEFT_FILE) and beside.is_file():
            source, text = str(beside), beside.read_text(encoding="utf-8")
        else:
            source, text = f"{path}'s metadata", metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except (ValueError, OSError) as error:
        raise UserError(f"the adapter's settings beside {path} cannot be read ({error}): download it again") from error
    prefix = f"{model}."
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    is_of_all = model == TRANSFORMER  # settings without a model's name
    settings = own or {key: value for key, value in settings.items() if is_of_all and not key.startswith("text_enc")}
    if not settings:
        if is_adapter:
            raise UserError(
                f"{path} is a PEFT adapter without its {PEFT_CONFIG}, which has its strength: put that beside it"
            )
        return PeftSettings()
    _require_plain(source, settings)
    try:
        patterns = {
            re.compile(name).pattern: float(alpha) for name, alpha in (settings.get("alpha_pattern") or {}).items()
        }
        alpha = float(settings["lora_alpha"] if "lora_alpha" in settings else _usual("lora_alpha"))
        if not all(map(math.isfinite, [alpha, *patterns.values()])):
            raise ValueError("an alpha is not finite")
    except (re.error, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} cannot be read ({error}): download it again") from error
    return PeftSettings(alpha, patterns, bool(settings.get("use_rslora")), bool(settings.get("use_dora")))


def _require_plain(source: str, settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("peft_type") or "LORA").rsplit(".", 1)[-1]
    if kind != "LORA":
        raise UserError(f"{source} is of PEFT's {kind}, which is {PLAIN}")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{source} says init_lora_weights {start}, which fits a base that it changed: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for name, value in settings.items():
        if value and name not in _HARMLESS_SETTINGS and value != _usual(name):
            raise UserError(f"{source} says {name} {value}, which is {PLAIN}")


def _usual(name: str) -> Any:
    """A setting of PEFT's as it is without being set."""
    from peft import LoraConfig  # its import takes seconds, and our own files need no default

    return LoraConfig().to_dict().get(name)
