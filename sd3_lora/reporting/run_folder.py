"""What a run left in its output folder, read for the report: finished, still going on, or of an earlier version."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sd3_lora.common.checksums import without_checksum
from sd3_lora.common.command_line import UserError, quoted
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH
from sd3_lora.common.run_record import NotedPicture
from sd3_lora.training.checkpoints import RECORD, checkpoint_folders, is_checkpoint, read_pictures, read_summary
from sd3_lora.training.early_warning import Measurement
from sd3_lora.training.gallery import SAMPLES
from sd3_lora.training.loss_log import LoggedStep

TRAINING_SCRIPT = "train_dreambooth_sd3_lora_miniature.py"
# A flag that one script alone has → the script, to tell whose record a `run.json` is.
_TELLING_FLAGS = {
    "max_train_steps": TRAINING_SCRIPT,
    "vae_batch_size": "precompute_latents.py",
    "outdir": "inference.py",
    "sample_batch_size": "draw_class_pictures.py",
}
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
        training: its record; where the run has not ended, that of its newest checkpoint, which has no results.
        earlier: the records of the scripts that prepared it, in their order.
        checkpoint: `step`, `steps` and `signature` (flag or noun → value) of its newest checkpoint.
        losses: of each optimizer step.
        measurements: of the early warning.
        pictures: that it is trained on; None where nothing names them.
        step_folders: optimizer step → the folder of its validation pictures.
        loras: optimizer step → the files of the LoRA of that step.
        damaged: lines that could not be read, by file.
        foreign: whether the `run.json` in the folder is no record of training, or damaged.
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
    foreign: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether training came to its end, and wrote its record."""
        return bool(self.training.values) and self.training.path.parent == self.folder

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as is known."""
        return max([self.training.values.get("steps") or 0, *(line.step for line in self.losses)])

    @property
    def planned_steps(self) -> int | None:
        """Optimizer steps that were asked for; None where nothing tells."""
        if self.has_ended:
            return self.steps
        return self.checkpoint.get("steps") or self.training.flags.get("max_train_steps")

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
    _require_folder(folder)
    record = _read_record(folder / RECORD)
    losses, damaged_losses = _read_lines(folder / "losses.jsonl", LoggedStep)
    if not losses and record.script != TRAINING_SCRIPT:
        raise UserError(
            f"{folder} holds {_instead_of_a_run(folder, record)}: give the --output_dir of a training run that has "
            "taken its first steps"
        )
    measurements, damaged_measurements = _read_lines(folder / "early_warning.jsonl", Measurement)
    damaged = {"losses.jsonl": damaged_losses, "early_warning.jsonl": damaged_measurements}
    checkpoints = checkpoint_folders(folder)
    training = _newest_record(record, losses, checkpoints)
    last = max((line.step for line in losses), default=training.values.get("steps") or 0)
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
        (folder / RECORD).exists() and record.script != TRAINING_SCRIPT,
    )


def _require_folder(folder: Path) -> None:
    """Raises `UserError` where a path is no folder, or a checkpoint in that of its run."""
    if folder.is_file() or is_checkpoint(folder):
        what = "a checkpoint in the folder of its run" if folder.is_dir() else "a file, and a run is a folder"
        try:
            run = read_run(folder.parent).folder
        except UserError:
            raise UserError(f"{folder} is {what}: give the --output_dir of a training run") from None
        command = quoted(["python", "-m", "sd3_lora.report", str(run)])
        raise UserError(f"{folder} is {what}: type `{command}`")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the --output_dir of a training run")


def _instead_of_a_run(folder: Path, record: ScriptRecord) -> str:
    """What a folder without a run holds."""
    if record.script:
        return f"what {record.script} wrote, and no training run"
    if (folder / RECORD).exists():
        return f"a {RECORD} that is damaged or not of this trainer"
    if (folder / "losses.jsonl").exists():
        return "a losses.jsonl without a line of this trainer"
    return f"neither {RECORD} nor losses.jsonl"


def _newest_record(record: ScriptRecord, losses: Sequence[LoggedStep], checkpoints: Sequence[Path]) -> ScriptRecord:
    """The record of a run that has ended; else, also of one that went on since, that of its newest checkpoint."""
    is_training = record.script == TRAINING_SCRIPT
    ended_at = record.values.get("steps") or math.inf
    if is_training and all(line.step <= ended_at for line in losses):
        return record
    noted = (_read_record(checkpoint / RECORD) for checkpoint in reversed(checkpoints))
    empty = replace(record, script=TRAINING_SCRIPT, values={})
    return next((each for each in noted if each.script == TRAINING_SCRIPT), record if is_training else empty)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_record(path: Path, script: str = "") -> ScriptRecord:
    """A record, empty where it cannot be read; its script by its flags, unless one is named."""
    try:
        values = without_checksum(_mapping(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        values = {}
    flags = _mapping(values.get("flags"))
    return ScriptRecord(script or next((of for flag, of in _TELLING_FLAGS.items() if flag in flags), ""), path, values)


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
        records = [_read_record(path, script) for script, path in paths.items()]
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
            if not all(_is_right(getattr(made, each.name), str(each.type)) for each in fields(kind)):
                raise ValueError("a chart has no place for it")
            read[int(made.step)] = made
        except (ValueError, TypeError, AttributeError):
            damaged += 1
    return tuple(line for _, line in sorted(read.items())), damaged


def _is_right(value: Any, annotation: str) -> bool:
    """Whether a number of a log is one, finite, and there where it must be."""
    if isinstance(value, list):
        return annotation.startswith("Sequence") and all(_is_right(each, "float") for each in value)
    if isinstance(value, int | float):
        return math.isfinite(value)
    return annotation not in ("int", "float", "bool") and value in (None, ())


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
