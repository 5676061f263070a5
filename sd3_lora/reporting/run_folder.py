"""What a run left in its output folder, read for the report: finished, still going on, or of an earlier version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from sd3_lora.common.checksums import without_checksum
from sd3_lora.common.command_line import UserError
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH
from sd3_lora.common.run_record import NotedPicture
from sd3_lora.training.checkpoints import checkpoint_folders, read_pictures, read_summary
from sd3_lora.training.early_warning import Measurement
from sd3_lora.training.gallery import SAMPLES
from sd3_lora.training.loss_log import LoggedStep

TRAINING_SCRIPT = "train_dreambooth_sd3_lora_miniature.py"
_STEP_FOLDER = re.compile(r"step_(\d+)$")
_LORA_OF_STEP = re.compile(r".*-step(\d+)(_ema)?\.safetensors$")
_Line = TypeVar("_Line", LoggedStep, Measurement)


@dataclass(frozen=True)
class ScriptRecord:
    """A `run.json`.

    Attributes:
        script: that wrote it.
        path: of the file.
        values: its content; empty where there is none.
    """

    script: str
    path: Path
    values: Mapping[str, Any]

    @property
    def flags(self) -> Mapping[str, Any]:
        """What the script was told, defaults included."""
        return _mapping(self.values.get("flags"))

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """The measurements of each of its stages."""
        return [stage for stage in self.values.get("stages") or () if isinstance(stage, dict)]


@dataclass(frozen=True)
class RunFolder:
    """A run, as far as its folder tells.

    Attributes:
        folder: the output folder.
        training: its record; without values where the run has not ended yet.
        earlier: the records of the scripts that prepared it, in their order.
        checkpoint: `step`, `steps` and `signature` (flag or noun → value) of its newest checkpoint.
        losses: of each optimizer step.
        measurements: of the early warning.
        pictures: that it is trained on; None where nothing names them.
        step_folders: optimizer step → the folder of its validation pictures.
        loras: optimizer step → the files of the LoRA of that step.
        damaged: lines that could not be read, by file.
    """

    folder: Path
    training: ScriptRecord
    earlier: tuple[ScriptRecord, ...] = ()
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[LoggedStep, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    pictures: tuple[NotedPicture, ...] | None = None
    step_folders: Mapping[int, Path] = field(default_factory=dict)
    loras: Mapping[int, tuple[Path, ...]] = field(default_factory=dict)
    damaged: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether training came to its end, and wrote its record."""
        return bool(self.training.values)

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as is known."""
        return max([self.training.values.get("steps") or 0, *(line.step for line in self.losses)])

    @property
    def planned_steps(self) -> int | None:
        """Optimizer steps that were asked for; None where nothing tells."""
        if self.has_ended:
            return self.steps
        return self.checkpoint.get("steps")

    def value(self, name: str) -> Any:
        """What a training flag was, as the record has it, or else the checkpoint; None where neither does."""
        value = self.training.flags.get(name)
        return self.signature.get(f"--{name}") if value is None else value

    @property
    def signature(self) -> Mapping[str, Any]:
        """What decides the run's numbers, as it was compared on a resume."""
        return _mapping(self.training.values.get("identity")) or _mapping(self.checkpoint.get("signature"))


def read_run(folder: Path) -> RunFolder:
    """Reads what is there; nothing of it is changed.

    Raises:
        UserError: there is nothing of a run.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the --output_dir of a training run")
    training = _read_record(TRAINING_SCRIPT, folder / "run.json")
    losses, damaged_losses = _read_lines(folder / "losses.jsonl", LoggedStep)
    if not losses and not training.values:
        raise UserError(
            f"{folder} holds neither run.json nor losses.jsonl: give the --output_dir of a training run that has "
            "taken its first steps"
        )
    measurements, damaged_measurements = _read_lines(folder / "early_warning.jsonl", Measurement)
    damaged = {"losses.jsonl": damaged_losses, "early_warning.jsonl": damaged_measurements}
    last = max((line.step for line in losses), default=training.values.get("steps") or 0)
    checkpoints = checkpoint_folders(folder)
    return RunFolder(
        folder,
        training,
        tuple(_earlier_records(training)),
        read_summary(checkpoints[-1]) if checkpoints else {},
        losses,
        measurements,
        _noted_pictures(folder, checkpoints),
        {step: path for step, path in _step_folders(folder / SAMPLES) if step <= last},
        _loras(folder),
        {name: count for name, count in damaged.items() if count},
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_record(script: str, path: Path) -> ScriptRecord:
    try:
        return ScriptRecord(script, path, without_checksum(_mapping(json.loads(path.read_text(encoding="utf-8")))))
    except (OSError, ValueError):
        return ScriptRecord(script, path, {})


def _earlier_records(training: ScriptRecord) -> Iterator[ScriptRecord]:
    """Those of stage one, and of the class pictures, where they are still there."""
    flags = training.flags
    paths = {
        "compute_embeddings.py": Path(flags.get("data_df_path") or EMBEDDINGS_PATH).with_suffix(".json"),
        "precompute_latents.py": Path(flags.get("latents_path") or LATENTS_PATH) / "run.json",
    }
    if flags.get("with_prior_preservation") and flags.get("class_data_dir"):
        paths["draw_class_pictures.py"] = Path(flags["class_data_dir"]) / "run.json"
    if training.values:
        records = [_read_record(script, path) for script, path in paths.items()]
        yield from (record for record in records if record.values)


def _read_lines(path: Path, kind: type[_Line]) -> tuple[tuple[_Line, ...], int]:
    """The JSON lines of a log by step, the last of each; and how many are damaged.

    A last line without its end is one that is just being written.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return (), 0
    names, read, damaged = {each.name for each in fields(kind)}, dict[int, _Line](), 0
    for line in lines:
        try:
            values = {name: value for name, value in without_checksum(json.loads(line)).items() if name in names}
            made = kind(**values)
            read[int(made.step)] = made
        except (ValueError, TypeError, AttributeError):
            damaged += 1
    return tuple(line for _, line in sorted(read.items())), damaged


def _noted_pictures(folder: Path, checkpoints: list[Path]) -> tuple[NotedPicture, ...] | None:
    for place in (folder, *reversed(checkpoints)):
        pictures = read_pictures(place)
        if pictures is not None:
            return tuple(pictures)
    return None


def _step_folders(samples: Path) -> Iterator[tuple[int, Path]]:
    paths = sorted(samples.iterdir()) if samples.is_dir() else ()
    for path in paths:
        match = _STEP_FOLDER.match(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def _loras(folder: Path) -> dict[int, tuple[Path, ...]]:
    found = dict[int, tuple[Path, ...]]()
    for path in sorted(folder.glob("*.safetensors")):
        match = _LORA_OF_STEP.match(path.name)
        if match:
            found[int(match[1])] = (*found.get(int(match[1]), ()), path)
    return dict(sorted(found.items()))
