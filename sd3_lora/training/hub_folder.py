"""The folder that goes to the hub: the LoRA and all that strangers need, and nothing that is private.

`OUTPUT_DIR/hub/` holds what is uploaded, so that it can be looked at, and uploaded again by `hf upload`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import unfinished_path
from sd3_lora.common.checksums import CHECKSUM_FIELD, with_checksum
from sd3_lora.common.command_line import PATH_FLAGS, link_or_copy
from sd3_lora.training.checkpoints import RECORD, checkpoint_folders
from sd3_lora.training.gallery import SAMPLES, find_pictures, find_sheet
from sd3_lora.training.hub_flags import HUB_FLAGS
from sd3_lora.training.model_card import FOLDER_IN_CARD, NOTICE, NOTICE_FILE

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

HUB_FOLDER = "hub"
_MODEL_FLAG = "pretrained_model_name_or_path"
_OF_ONE_STEP = re.compile(r".*-step\d+(_ema)?(_learned_embeds)?\.safetensors")  # of before the end


def make_hub_folder(output_dir: Path, repo_id: str, checkpoints: str = "none") -> Path:
    """Makes `hub/` of what is in the output folder; an earlier one is replaced.

    Args:
        output_dir: of the run, with its LoRA.
        repo_id: which the card's example names.
        checkpoints: none, lora (of each its LoRA) or all.
    """
    folder, unfinished = output_dir / HUB_FOLDER, unfinished_path(output_dir / HUB_FOLDER)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for path in _weights(output_dir, checkpoints):
        link_or_copy(path, unfinished / path.relative_to(output_dir))
    card, record = output_dir / "README.md", output_dir / "run.json"
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace(FOLDER_IN_CARD, repo_id)
        (unfinished / card.name).write_text(text, encoding="utf-8")
        if NOTICE in text:
            (unfinished / NOTICE_FILE).write_text(NOTICE + "\n", encoding="utf-8")
    if record.is_file():
        public = public_record(json.loads(record.read_text(encoding="utf-8")))
        text = json.dumps(public, indent=1, ensure_ascii=False)
        (unfinished / record.name).write_text(text + "\n", encoding="utf-8")
    for picture in find_pictures(output_dir):
        _copy_picture(picture.path, unfinished / picture.path.relative_to(output_dir))
    sheet = find_sheet(output_dir)
    if sheet:
        link_or_copy(sheet, unfinished / SAMPLES / sheet.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return folder


def _weights(output_dir: Path, checkpoints: str) -> Iterable[Path]:
    """The LoRA, its other forms and its identifier's embedding, or a whole model; of checkpoints what is asked for."""
    if _is_whole(output_dir):
        index = output_dir / "model_index.json"
        yield index
        for name, value in json.loads(index.read_text(encoding="utf-8")).items():
            yield from _files_in(output_dir / name) if isinstance(value, list) else ()
    for path in sorted(output_dir.glob("*.safetensors")):
        if checkpoints != "none" or not _OF_ONE_STEP.fullmatch(path.name):
            yield path
    if checkpoints != "none":
        for folder in checkpoint_folders(output_dir):
            loras = "pytorch_lora_weights*.safetensors", "learned_embeds*.safetensors"
            of_loras = sorted(path for pattern in loras for path in folder.glob(pattern))
            found = _files_in(folder) if checkpoints == "all" else of_loras
            yield from (path for path in found if path.name != RECORD)  # it names folders


def _files_in(folder: Path) -> Iterable[Path]:
    """All files below a folder, if it is there."""
    return [path for path in sorted(folder.glob("**/*")) if path.is_file()]


def _is_whole(output_dir: Path) -> bool:
    """Whether the last run trained the whole transformer, and made a model of it."""
    record = output_dir / "run.json"
    if not (record.is_file() and (output_dir / "model_index.json").is_file()):
        return False
    return bool(json.loads(record.read_text(encoding="utf-8")).get("flags", {}).get("full"))


def _copy_picture(path: Path, copy: Path) -> None:
    """The same pixels. Of the text in a PNG only the prompt and its settings stay: ours names the model's folder."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as picture:
        if not isinstance(picture, PngImageFile):
            shutil.copyfile(path, copy)
            return
        text = PngInfo()
        if "parameters" in picture.text:
            text.add_itxt("parameters", picture.text["parameters"])
        picture.save(copy, format="PNG", pnginfo=text)


def public_record(record: dict[str, Any]) -> dict[str, Any]:
    """`run.json` without folders: of a path its last name is left. What the hub was told is left out."""
    is_hub_model = bool(record.get("revision"))
    flags = {
        name: _last_name(value) if name in PATH_FLAGS and not (name == _MODEL_FLAG and is_hub_model) else value
        for name, value in record.get("flags", {}).items()
        if name not in HUB_FLAGS
    }
    model = record.get("model") if is_hub_model else _last_name(record.get("model"))
    public = {**record, "flags": flags, "model": model, "wrote": _last_name(record.get("wrote"))}
    is_checked = CHECKSUM_FIELD in record
    return with_checksum(_without_paths(public)) if is_checked else dict(_without_paths(public))


def _last_name(value: Any) -> Any:
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) else value


def _without_paths(value: Any) -> Any:
    """The last name of every text that is a full path, whatever has put it there."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and re.match(r"~|/[^/ ]+/|[A-Za-z]:[/\\]", value):
        return _last_name(value)
    return value
