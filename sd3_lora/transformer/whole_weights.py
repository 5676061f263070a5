"""The transformer's own weights, all of them trained (`--full`), and their folder in diffusers' layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.tensor_files import TensorFiles, read_shards, write_shards

import torch
from diffusers import SD3Transformer2DModel


def train_whole(transformer: SD3Transformer2DModel) -> Sequence[torch.nn.Parameter]:
    """Has every weight trained; returns them."""
    transformer.requires_grad_(True)
    return list(transformer.parameters())


def write_transformer(folder: Path, transformer: SD3Transformer2DModel, files: ModelFiles) -> None:
    """Writes the weights as they are now, in the dtype that they are trained in, file by file.

    What is not trained, the positional embedding, is the base's: on the device there may be its middle alone.

    Args:
        folder: to make; not atomic.
        transformer: that is trained.
        files: of the base.

    Raises:
        UserError: a weight is not finite.
        OSError: the disk returned other bytes than were written.
    """
    trained = dict(transformer.named_parameters())
    variant = f".{files.config.variant}" if files.config.variant else ""
    with TensorFiles(files.weight_files("transformer")) as base:
        tensors = {name: trained.get(name) for name in base.shapes()}
        whole = {name: base.tensor(name) if tensor is None else tensor for name, tensor in tensors.items()}
        write_shards(folder, f"diffusion_pytorch_model{variant}{{suffix}}.safetensors", whole)
    shutil.copyfile(files.component("transformer") / "config.json", folder / "config.json")
    for index in folder.glob(f"*{variant}.safetensors.index.json") if variant else ():
        index.rename(folder / f"diffusion_pytorch_model.safetensors.index{variant}.json")


def read_transformer(folder: Path, transformer: SD3Transformer2DModel) -> None:
    """Goes on with the weights that `write_transformer` wrote.

    Raises:
        UserError: the folder is not whole.
    """
    read_shards(folder, dict(transformer.named_parameters()))
