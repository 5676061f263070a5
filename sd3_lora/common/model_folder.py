"""A pipeline's folder made of another's files, with some of its models written anew."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from sd3_lora.common.command_line import link_or_copy
from sd3_lora.common.model_files import ModelFiles

_WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data")


def files_beside(files: ModelFiles, changed: Collection[str]) -> Iterator[str]:
    """All files of the pipeline but the weights of the changed models, by their paths in its folder.

    Of weights, and of lists of weight files, those of the variant that was asked for.
    """
    yield "model_index.json"
    variant = files.config.variant
    for component in files.components():
        folder = files.component(component)
        kept = [] if component in changed else files.weight_files(component)
        for path in sorted(folder.rglob("*")):
            is_of_variant = ".index." not in path.name or not variant or f".{variant}" in path.name
            if path.is_file() and is_of_variant and (path.suffix not in _WEIGHTS or path in kept):
                yield str(path.relative_to(files.folder))


def take(source: Path, path: Path, copies: bool = False) -> None:
    """A hard link for weights, where that can be; else a copy."""
    if source.suffix in _WEIGHTS and not copies:
        link_or_copy(source, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
