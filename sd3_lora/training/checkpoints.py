"""Checkpoints for exact resume: safetensors and JSON, no pickle.

`checkpoint-N/` holds the state after N optimizer steps: `state.safetensors` (every tensor of the LoRA, the optimizer
and the random generators), `state.json` (everything else, with a placeholder where a tensor belongs), and the LoRA in
diffusers' format, so that a checkpoint can be drawn with as it is. For people and the report: `pictures.json` names the
pictures, and `run.json` has the run's settings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import unfinished_path
from sd3_lora.common.checksums import (
    Checksums,
    DamagedError,
    checksum,
    with_checksum,
    with_checksums,
    without_checksum,
)
from sd3_lora.common.command_line import UserError, print_in_rank_0, write_text_atomically
from sd3_lora.common.run_record import NotedPicture

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

RECORD, REPORT_FILE = "run.json", "report.html"  # of a run
_TENSORS, _STATE, _PICTURES = "state.safetensors", "state.json", "pictures.json"


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """Nested state → plain JSON, with its tensors moved into `tensors`.

    Dictionaries keep the types of their keys (optimizers use integers); a tensor becomes `{"tensor": its name}`.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    if isinstance(value, torch.Tensor):
        # A copy: safetensors refuses tensors that share memory, as bitsandbytes' quantization maps do.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, pack(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest step first."""
    return sorted(filter(is_checkpoint, _numbered_folders(output_dir)), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is itself a checkpoint, and not the folder of its run."""
    return (folder / _STATE).is_file()


class UnfinishedCheckpoint:
    """A checkpoint under a temporary name, renamed when the block ends without an error.

    Args:
        output_dir: where it will lie.
        step: after which it is taken.
    """

    def __init__(self, output_dir: Path, step: int):
        self.final = output_dir / f"checkpoint-{step}"
        self.folder = unfinished_path(self.final)

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a killed process with this number
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            _remove(self.final)
            os.replace(self.folder, self.final)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes a nested state of tensors and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(state, tensors)
    (folder / _STATE).write_text(json.dumps(packed) + "\n", encoding="utf-8")
    beside = {_STATE: checksum((folder / _STATE).read_bytes())}
    save_file(tensors, folder / _TENSORS, with_checksums(tensors, {}, beside))
    shutil.copymode(folder / _STATE, folder / _TENSORS)  # safetensors lets only the owner read


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote.

    Raises:
        UserError: the folder holds no whole checkpoint, a damaged one, or one with numbers that are not finite.
    """
    try:
        text = (folder / _STATE).read_bytes()
        with safe_open(folder / _TENSORS, "pt") as handle:
            sums = Checksums(handle)
        tensors = load((folder / _TENSORS).read_bytes())  # not mapped: Windows deletes no file that is
        packed = json.loads(text)
        state = unpack(packed, tensors)
        if not isinstance(state, dict):
            raise TypeError("not a state")
        for name, tensor in tensors.items():
            sums.require(name, tensor)
        if sums.beside.get(_STATE, checked := checksum(text)) != checked:
            raise DamagedError(f"its {_STATE} has another checksum than when it was written")
    except DamagedError as error:
        raise UserError(f"{folder} is damaged, {error}: {_remedy(folder)}") from error
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a whole checkpoint of this project ({type(error).__name__}): "
            "give another to --resume_from_checkpoint"
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder} is damaged, with a NaN or infinity in {name.lstrip('/')}: {_remedy(folder)}")
    return state


def _remedy(folder: Path) -> str:
    """What to type in place of a damaged checkpoint: the last one before it, where there is one."""
    number = step_of(folder) if folder in _numbered_folders(folder.parent) else -1
    earlier = [other for other in checkpoint_folders(folder.parent) if step_of(other) < number]
    go_on = f"type --resume_from_checkpoint {earlier[-1].name}" if earlier else "no earlier one is there: delete it"
    return f"{go_on}, or give another --output_dir for a new run"


def read_summary(folder: Path) -> dict[str, Any]:
    """What of a checkpoint is no tensor and tells of its run: `step`, `steps`, `signature`; what it has of them."""
    try:
        packed = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return {key: unpack(item, {}) for key, item in packed["dict"] if key in ("step", "steps", "signature")}
    except (OSError, TypeError, ValueError, KeyError):
        return {}


def write_pictures(folder: Path, pictures: Sequence[NotedPicture]) -> None:
    """Notes the pictures beside the state."""
    content = [with_checksum(_without_defaults(picture)) for picture in pictures]
    write_text_atomically(folder / _PICTURES, json.dumps(content, ensure_ascii=False) + "\n")


def _without_defaults(picture: NotedPicture) -> dict[str, Any]:
    """Its fields; those that came later only where they are no default, so that earlier builds read them too."""
    later: dict[str, Any] = {"other_prompts": (), "repeats": 1}
    return {name: value for name, value in asdict(picture).items() if later.get(name) != value}


def _noted(values: dict[str, Any]) -> NotedPicture:
    lists: dict[str, Any] = {name: tuple(values[name]) for name in ("crops", "other_prompts") if name in values}
    return NotedPicture(**{**values, **lists})


def read_pictures(folder: Path) -> list[NotedPicture] | None:
    """What `write_pictures` wrote; None where it is missing or damaged: earlier builds noted a hash alone."""
    try:
        content = json.loads((folder / _PICTURES).read_text(encoding="utf-8"))
        return [_noted(without_checksum(picture)) for picture in content]
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, KeyError, AttributeError):
        print_in_rank_0(f"note: {folder / _PICTURES} is damaged and not used; the next checkpoint has its own")
        return None


def find_checkpoint(asked: str, output_dir: Path) -> Path | None:
    """The checkpoint folder behind `--resume_from_checkpoint`.

    Args:
        asked: `latest`, the name of a checkpoint in `output_dir`, or a path anywhere.
        output_dir: of the run.

    Returns:
        None for `latest` where there is none yet.

    Raises:
        UserError: there is no such checkpoint.
    """
    folders = checkpoint_folders(output_dir)
    if asked == "latest":
        return folders[-1] if folders else None
    for folder in (Path(asked), output_dir / asked):
        if folder.is_dir():
            return folder
    names = ", ".join(folder.name for folder in folders) or "none"
    raise UserError(f"--resume_from_checkpoint {asked} is not there; {output_dir} holds {names}: type latest or a path")


def resume_point(asked: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: there is none of that name, or there are checkpoints of an earlier run, and this one is new.
    """
    require_own_checkpoints(output_dir)
    if asked is not None:
        return find_checkpoint(asked, output_dir)
    earlier = checkpoint_folders(output_dir)
    if earlier:
        raise UserError(
            f"{output_dir} holds {earlier[-1].name} of an earlier run: add --resume_from_checkpoint latest to go on, "
            "or give another --output_dir"
        )
    return None


def require_own_checkpoints(output_dir: Path) -> None:
    """Checks that no other program's checkpoint is the latest: a run would start anew beside it, and replace it.

    Raises:
        UserError: one is.
    """
    latest = max(map(step_of, checkpoint_folders(output_dir)), default=-1)
    for folder in _numbered_folders(output_dir):
        if step_of(folder) > latest and any(folder.iterdir()):
            raise UserError(
                f"{folder} is not a checkpoint of this project, which cannot go on from it: give another --output_dir, "
                "or move it away"
            )


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Deletes the oldest until at most `limit` are left, and the unfinished checkpoints of killed runs."""
    if limit is not None:
        for folder in checkpoint_folders(output_dir)[:-limit]:
            _remove(folder)
    for folder in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint under another name first, so that half of one is never taken for whole."""
    hidden = unfinished_path(folder.with_name(f"{folder.name}.old"))
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        os.replace(folder, hidden)
    except OSError:  # it is not there, or Windows has a file of it open
        return
    shutil.rmtree(hidden, ignore_errors=True)


def _numbered_folders(output_dir: Path) -> Iterator[Path]:
    return (
        folder
        for folder in output_dir.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdecimal() and folder.is_dir()
    )


def step_of(folder: Path) -> int:
    """The optimizer steps after which a checkpoint was taken, by its name."""
    return int(folder.name.removeprefix("checkpoint-"))
