"""Checkpoints for exact resume: safetensors and JSON, no pickle.

`checkpoint-N/` holds the state after N optimizer steps: `state.safetensors` (every tensor of the LoRA, the optimizer
and the random generators), `state.json` (everything else, with a placeholder where a tensor belongs), and the LoRA in
diffusers' format, so that a checkpoint can be drawn with as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.run_record import RunIdentity

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_TENSORS, _STATE = "state.safetensors", "state.json"


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
    folders = [
        folder
        for folder in output_dir.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit() and (folder / _STATE).is_file()
    ]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


class UnfinishedCheckpoint:
    """A checkpoint under a temporary name, renamed when the block ends without an error.

    Args:
        output_dir: where it will lie.
        step: after which it is taken.
    """

    def __init__(self, output_dir: Path, step: int):
        self.final = output_dir / f"checkpoint-{step}"
        self.folder = output_dir / f".checkpoint-{step}.{os.getpid()}"

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.final, ignore_errors=True)
            os.replace(self.folder, self.final)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes a nested state of tensors and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(state, tensors)
    save_file(tensors, folder / _TENSORS)
    (folder / _STATE).write_text(json.dumps(packed) + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote.

    Raises:
        UserError: the folder holds no whole checkpoint.
    """
    try:
        packed = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        state = unpack(packed, load_file(folder / _TENSORS))
        if not isinstance(state, dict):
            raise TypeError("not a state")
        return state
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a whole checkpoint of this project ({type(error).__name__}): "
            "give another to --resume_from_checkpoint"
        ) from error


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
    if asked == "latest":
        folders = checkpoint_folders(output_dir)
        return folders[-1] if folders else None
    for folder in (Path(asked), output_dir / asked):
        if folder.is_dir():
            return folder
    names = ", ".join(folder.name for folder in checkpoint_folders(output_dir)) or "none"
    raise UserError(f"--resume_from_checkpoint {asked} is not there; {output_dir} holds {names}: type latest or a path")


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Deletes the oldest until at most `limit` are left, and the unfinished checkpoints of killed runs."""
    for folder in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
    if limit is not None:
        for folder in checkpoint_folders(output_dir)[:-limit]:
            shutil.rmtree(folder)


def require_same_run(saved: Mapping[str, Any], identity: RunIdentity, folder: Path) -> None:
    """Checks that the run's identity is unchanged.

    A flag that the checkpoint's build did not have had its default. A flag that only a newer build has is refused
    whatever its value, since its effect on the numbers is not known here.

    Args:
        saved: flag or noun → value, of the checkpoint.
        identity: of this command.
        folder: the checkpoint's.

    Raises:
        UserError: one differs, or is unknown; names it with its values.
    """
    for name, value in identity.unknown(saved):
        raise UserError(
            f"{folder} was trained with {name} {value}, which this build does not know: resume it with the newer "
            "build that wrote it, or give another --output_dir for a new run"
        )
    for name, before, now in identity.changed(saved):
        raise UserError(
            f"{folder} was trained with {name} {before}, not {now}: type the same to go on, "
            "or give another --output_dir for a new run"
        )
