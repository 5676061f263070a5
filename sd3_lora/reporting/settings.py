"""The settings of a run, flag by flag, and the commands that make it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sd3_lora.common.command_line import SECRET_FLAGS, command
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig, group_classes
from sd3_lora.common.run_record import flag_defaults
from sd3_lora.drawing.config import ClassDrawingConfig
from sd3_lora.reporting.run_folder import TRAINING_SCRIPT, RunFolder, ScriptRecord
from sd3_lora.stage_one.config import EmbeddingConfig, LatentConfig
from sd3_lora.training.config import TrainingFlags

_SHARED = (ModelConfig, DeviceConfig, BudgetConfig)
GROUPS: dict[str, tuple[type, ...]] = {
    "compute_embeddings.py": (EmbeddingConfig, *_SHARED),
    "precompute_latents.py": (LatentConfig, *_SHARED),
    "draw_class_pictures.py": (ClassDrawingConfig, *_SHARED),
    TRAINING_SCRIPT: group_classes(TrainingFlags),
}
_NOT_AGAIN = {"resume_from_checkpoint", "overwrite", "plan"} | SECRET_FLAGS


@dataclass(frozen=True)
class Setting:
    """A flag and its value.

    Attributes:
        name: of the flag, without hyphens before it.
        value: as text.
        is_default: whether that is its default.
        help: what it says of itself; empty for a flag that this build does not have.
    """

    name: str
    value: str
    is_default: bool
    help: str


@dataclass(frozen=True)
class SettingGroup:
    """Flags under the heading that `--help` has for them."""

    title: str
    settings: tuple[Setting, ...]


def training_settings(run: RunFolder) -> list[SettingGroup]:
    """All flags of training; of a run that has not ended those that its checkpoint notes."""
    flags = dict(run.training.flags) or {
        name.removeprefix("--"): value for name, value in run.signature.items() if name.startswith("--")
    }
    groups = []
    for group in GROUPS[TRAINING_SCRIPT]:
        title = (group.__doc__ or "").split(".")[0].split(":")[0].strip()
        settings = tuple(_settings(group, flags))
        groups.append(SettingGroup(title, settings))
    known = {each.name for group in GROUPS[TRAINING_SCRIPT] for each in fields(group)}
    others = (Setting(name, shown_value(flags[name]), False, "") for name in flags if name not in known | SECRET_FLAGS)
    groups.append(SettingGroup("Flags of an earlier version", tuple(others)))
    return [group for group in groups if group.settings]


def _settings(group: type, flags: Mapping[str, Any]) -> Iterator[Setting]:
    defaults = flag_defaults([group])
    for each in fields(group):
        if each.name in flags and each.name not in SECRET_FLAGS:
            value = flags[each.name]
            is_default = f"--{each.name}" in defaults and value == defaults[f"--{each.name}"]
            yield Setting(each.name, shown_value(value), is_default, each.metadata.get("help", ""))


def shown_value(value: Any) -> str:
    """A flag's value as one types it; a dash where nothing was given."""
    if value is None or value == [] or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(shown_value, value))
    return str(value)


def commands(run: RunFolder) -> list[str]:
    """The commands that make the run again, in their order; none where neither it nor a checkpoint has a record."""
    if not run.training.values:
        return []
    return [command_of(record) for record in (*run.earlier, run.training)]


def command_of(record: ScriptRecord) -> str:
    """The command with which a script does again what its record tells; flags at their defaults are left out."""
    groups = GROUPS[record.script]
    defaults, names = flag_defaults(groups), _names(groups)
    flags = {
        name: value
        for name, value in record.flags.items()
        if name in names - _NOT_AGAIN and value != defaults.get(f"--{name}")
    }
    if "seed" in names and record.values.get("seed") is not None:
        flags["seed"] = record.values["seed"]  # also where it was drawn
    # False is left out of a command, for it is the default of most flags; not of these.
    return command(record.script, **{name: "no" if value is False else value for name, value in flags.items()})


def _names(groups: Iterable[type]) -> set[str]:
    return {each.name for group in groups for each in fields(group)}
